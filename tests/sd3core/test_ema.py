import pytest
import torch

from sd3core.ema import decay_per_step, update_ema, warmed_decay


def test_decay_per_step():
    assert decay_per_step(0.99, 100) == pytest.approx(0.9998995, abs=1e-7)  # the paper's "about 0.9999"
    assert decay_per_step(0.99, 100) ** 100 == pytest.approx(0.99)


def test_an_average_of_a_constant_approaches_it_geometrically():
    average, weight = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(10):
        update_ema(average, weight, 0.9)
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 0.9**10))


def test_bf16_weights_move_an_fp32_average():
    average, weight = [torch.ones(1)], [torch.full((1,), 1.0078125, dtype=torch.bfloat16)]
    update_ema(average, weight, 0.9999)
    assert average[0].dtype == torch.float32 and average[0].item() == pytest.approx(1 + 0.0078125e-4, abs=1e-7)


def test_warmed_decay():
    assert warmed_decay(0.99, 0) == pytest.approx(0.1) and warmed_decay(0.99, 10_000) == 0.99
