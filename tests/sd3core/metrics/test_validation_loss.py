import numpy as np
import pytest
import torch

from sd3core.formulations import find_formulation
from sd3core.metrics import LeftOut
from sd3core.metrics.score import LEVELS
from sd3core.metrics.validation_loss import level_losses, validation_loss

IDS = np.arange(100, 112)


def latents(count=12):
    return torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_model_that_knows_x0_has_no_loss():
    """velocity = (z_t - x0) / t, since z_t = x0 + t (noise - x0)."""
    x0 = latents()
    losses = level_losses(lambda z, t: (z - x0) / t.view(-1, 1, 1, 1), x0, IDS, seed=3)
    assert losses.shape == (12, 8) and LEVELS[-1] == 1.0
    assert losses.max() < 1e-10


@pytest.mark.parametrize("name", ["rf", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)", "edm/rf"])
def test_networks_that_know_as_much_have_the_same_loss_in_any_formulation(name):
    """Each takes x0 for 0.3 too much everywhere; in its own units that is another error for each. t = 1 is not averaged."""
    x0, formulation = latents().double(), find_formulation(name)

    def predict(z_in, t_in):
        """The output for z = a x0 + b noise, whose level is found from the input's time."""
        t = torch.special.ndtr((4 * t_in + 1.2) / 1.2) if name.startswith("edm(") else t_in
        t = torch.sigmoid(4 * t_in) if name == "edm/rf" else t
        a, b = (part.view(-1, 1, 1, 1) for part in formulation.a_b(t.double()))
        z = z_in / formulation.prediction.input_scale(a, b)
        wrong = x0 + 0.3
        return formulation.prediction.target(wrong, (z - a * wrong) / b, a, b)

    losses = level_losses(formulation.as_rectified_flow(predict), x0, IDS, seed=3)
    expected = torch.tensor([(0.3 / t) ** 2 for t in LEVELS[:-1]]).double()  # velocity = (z - x0) / t
    torch.testing.assert_close(losses[:, :-1], expected.expand(12, -1), rtol=1e-4, atol=0)
    assert losses.isfinite().all()


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
