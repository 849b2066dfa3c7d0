"""Learning rate, loss by timestep and the FLOP count, against closed forms and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from fake_training import make_job, make_training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd3core.mmdit import MMDiT, MMDiTConfig
from workers.trainer.metrics import StepLoss, flops_per_sample, learning_rate, peak_flops


@pytest.mark.parametrize("depth", [1, 3])
def test_flops_are_those_that_torch_counts(depth):
    config = MMDiTConfig.from_depth(depth, context_dim=48, pooled_dim=40, position_max=8, position_side=8)
    model = MMDiT(config)
    inputs = torch.randn(1, 16, 8, 12), torch.rand(1), torch.randn(1, 10, 48), torch.randn(1, 40)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):  # the others go uncounted on a CPU
            model(*inputs)
    assert flops_per_sample(config, image_tokens=24, text_tokens=10) == 3 * counted.get_total_flops()


def test_learning_rate_warms_up_and_falls():
    constant = make_training(samples=1000, warmup_samples=80, global_batch=8, learning_rate=1.0)
    assert learning_rate(constant, 0) == pytest.approx(8 / 88)
    assert learning_rate(constant, 72) == pytest.approx(80 / 88)
    assert learning_rate(constant, 80) == learning_rate(constant, 999) == 1.0
    cosine = constant.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 80) == 1.0
    assert learning_rate(cosine, 540) == pytest.approx(0.55)
    assert learning_rate(cosine, 1000) == pytest.approx(0.1)
    assert learning_rate(make_training(warmup_samples=0, learning_rate=1.0), 0) == 1.0


def test_loss_by_timestep():
    step_loss = StepLoss(torch.device("cpu"))
    step_loss.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.1, 1.0]))
    step_loss.add(torch.tensor([7.0]), torch.tensor([0.5]))
    assert step_loss.row() == {"loss": 4.0, "loss_by_t": [2.0, None, None, None, 7.0, None, None, 5.0]}


def test_peak_is_measured_where_no_vendor_declares_one():
    flops, source = peak_flops(torch.device("cpu"), torch.float32)
    assert source == "measured" and flops > 1e8


def test_checkpoint_steps_follow_the_samples(tmp_path):
    job = make_job(tmp_path, samples=100, global_batch=8, micro_batch=8, checkpoint_every_samples=20)
    assert job.total_steps == 13
    assert [step for step in range(1, 14) if job.is_checkpoint_step(step)] == [3, 5, 8, 10, 13]
