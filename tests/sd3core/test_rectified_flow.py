import pytest
import torch

from sd3core.rectified_flow import (
    interpolate,
    resolution_shift,
    velocity_target,
)


def test_path_ends_in_data_and_noise_and_its_slope_is_the_velocity():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    t, step = torch.tensor([0.1, 0.5, 0.8]), 1e-2
    slope = (interpolate(x0, noise, t + step) - interpolate(x0, noise, t)) / step
    torch.testing.assert_close(slope, velocity_target(x0, noise), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("alpha", "shifted", "log_snr_change"),
    [
        (1.5, [0.142857, 0.333333, 0.6, 0.818182, 0.931034], -0.810930),
        (3.0, [0.25, 0.5, 0.75, 0.9, 0.964286], -2.197225),
        (4.0, [0.307692, 0.571429, 0.8, 0.923077, 0.972973], -2.772589),
    ],
)
def test_resolution_shift(alpha, shifted, log_snr_change):
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    moved = resolution_shift(t, alpha)
    torch.testing.assert_close(moved, torch.tensor(shifted, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        -2 * (torch.logit(moved) - torch.logit(t)), torch.full_like(t, log_snr_change), atol=1e-5, rtol=0
    )
    assert resolution_shift(0.0, alpha) == 0 and resolution_shift(1.0, alpha) == 1
