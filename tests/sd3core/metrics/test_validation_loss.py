import numpy as np
import pytest
import torch

from sd3core.metrics import LeftOut
from sd3core.metrics.validation_loss import LEVELS, level_losses, validation_loss

IDS = np.arange(100, 112)


def latents(count=12):
    return torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_model_that_knows_x0_has_no_loss():
    """velocity = (z_t - x0) / t, since z_t = x0 + t (noise - x0)."""
    x0 = latents()
    losses = level_losses(lambda z, t: (z - x0) / t.view(-1, 1, 1, 1), x0, IDS, seed=3)
    assert losses.shape == (12, 8) and LEVELS[-1] == 1.0
    assert losses.max() < 1e-10


def test_of_the_zero_velocity_is_the_mean_square_of_noise_minus_x0():
    losses = level_losses(lambda z, t: torch.zeros_like(z), latents(), IDS, seed=3)
    expected = 1 + latents().double().square().mean()
    assert float(losses.mean()) == pytest.approx(float(expected), rel=0.06)


def test_the_last_level_is_measured_but_not_averaged():
    losses = torch.ones(10, 8).double()
    losses[:, -1] = 100
    assert validation_loss(losses).value == 1.0 and validation_loss(losses).count == 10


def test_points_depend_on_the_sample_and_not_on_its_batch():
    def velocity(z, t):
        return z * t.view(-1, 1, 1, 1)

    whole = level_losses(velocity, latents(), IDS, seed=3)
    halves = [level_losses(velocity, latents()[rows], IDS[rows], seed=3) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, level_losses(velocity, latents(), IDS, seed=4))


def test_too_few_samples_are_left_out_with_the_bound():
    few = validation_loss(torch.ones(7, 8))
    assert isinstance(few, LeftOut) and "at least 8 held-out images" in few.reason and "7" in few.reason
