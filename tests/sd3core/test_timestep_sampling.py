import math

import pytest
import torch
from scipy import integrate

from sd3core.errors import UserError
from sd3core.rectified_flow import resolution_shift
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, Shifted, Steps, Uniform

ALL = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.6),
    LogitNormal(-1, 0.2),
    LogitNormal(1, 2.2),
    Mode(-1),
    Mode(-0.5),
    Mode(0),
    Mode(1),
    Mode(1.291667),
    Mode(1.75),
    CosMap(),
]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "std", "centre", "mean_t"),
    [
        (0, 1, 1.5957691216, 0.5),
        (0.5, 0.6, 1.8794125027, 0.613497),
        (1, 0.6, 0.6631809253, 0.716459),
        (-0.5, 1, 1.4082613071, 0.397973),
    ],
)
def test_logit_normal_goldens(mean, std, centre, mean_t):
    density = LogitNormal(mean, std)
    assert abs(density.density(float64(0.5)).item() - centre) < 1e-9
    assert density.density(float64(0, 1)).tolist() == [0, 0]
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert abs(density.quantile(u).mean().item() - mean_t) < 1e-5


@pytest.mark.parametrize(
    ("scale", "end", "quarter", "centre"),
    [
        (-1.0, float("inf"), 0.735105, 0.636620),
        (-0.5, 2, 0.883806, 0.777969),
        (0.0, 1, 1, 1),
        (0.375, 0.727273, 0.987061, 1.272343),
        (1.0, 0.5, 0.786497, 2.329896),
        (-1 + 2.75 * 5 / 6, 0.436364, 0.682450, 3.806314),
        (1.75, 0.363636, 0.548761, 903.809),
    ],
)
def test_mode_goldens(scale, end, quarter, centre):
    density = Mode(scale).density(float64(0, 0.25, 0.5, 0.75, 1))
    expected = float64(end, quarter, centre, quarter, end)
    finite = expected.isfinite()
    torch.testing.assert_close(density[finite], expected[finite], atol=1e-6, rtol=1e-6)
    assert (density[~finite] > 1e6).all()


def test_cosmap_goldens():
    expected = float64(0.636620, 1.018592, 1.273240, 1.018592, 0.636620)
    torch.testing.assert_close(CosMap().density(float64(0, 0.25, 0.5, 0.75, 1)), expected, atol=1e-6, rtol=0)
    assert CosMap().quantile(float64(0, 0.5, 1)).tolist() == pytest.approx([0, 0.5, 1], abs=1e-15)


@pytest.mark.parametrize("density", ALL, ids=str)
def test_quantile_is_the_inverse_of_the_integrated_density(density):
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    t = density.quantile(u)
    assert ((t[1:] - t[:-1]) > 0).all() and t.min() >= 0 and t.max() <= 1
    step = 1e-6  # dt/du of the quantile function is 1 / density
    slope = (density.quantile(u + step) - density.quantile(u - step)) / (2 * step)
    torch.testing.assert_close(slope * density.density(t), torch.ones_like(u), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("density", [d for d in ALL if d not in (Mode(-1), Mode(1.75))], ids=str)
def test_densities_integrate_to_one(density):
    total, _ = integrate.quad(lambda t: density.density(float64(t)).item(), 0, 1, points=[0.5], limit=200)
    assert abs(total - 1) < 1e-6


@pytest.mark.parametrize("density", ALL, ids=str)
def test_samples_follow_the_quantiles(density):
    t = density.sample(20_000, torch.Generator().manual_seed(0))
    assert t.shape == (20_000,) and t.dtype == torch.float32
    assert torch.equal(t, density.sample(20_000, torch.Generator().manual_seed(0)))
    for u in (0.1, 0.5, 0.9):
        assert abs((t <= density.quantile(float64(u)).item()).float().mean().item() - u) < 0.015


def test_shifting_a_logit_normal_moves_its_mean_by_ln_alpha():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = resolution_shift(LogitNormal(0.2, 0.7).quantile(u), 3.0)
    torch.testing.assert_close(shifted, LogitNormal(0.2 + 1.0986122886681098, 0.7).quantile(u))


def test_refusals():
    with pytest.raises(UserError, match="1.7519"):
        Mode(1.76)
    with pytest.raises(UserError, match="-1"):
        Mode(-1.01)
    with pytest.raises(UserError, match="std"):
        LogitNormal(0, 0)
    with pytest.raises(UserError, match="alpha must be positive"):
        Shifted(Uniform(), 0)
    with pytest.raises(UserError, match="count"):
        Steps(0)


SHIFTED = [
    Shifted(LogitNormal(0.2, 0.7), 3.0),
    Shifted(Uniform(), 4.0),
    Shifted(Mode(1.29), 1.5),
    Shifted(CosMap(), 0.5),
]


@pytest.mark.parametrize("density", ALL + SHIFTED, ids=str)
def test_a_histogram_of_draws_is_the_density(density):
    """Chi-square of 40 bins of 100,000 draws, each bin's share from the integrated density; p = 1e-4 is 82."""
    count, edges = 100_000, torch.linspace(0, 1, 41, dtype=torch.float64)
    found = torch.histc(density.sample(count, torch.Generator().manual_seed(1)).double(), 40, 0, 1)
    fine = torch.linspace(0, 1, 40 * 500 + 1, dtype=torch.float64)
    middles = (fine[1:] + fine[:-1]) / 2
    share = (density.density(middles) / len(middles)).view(40, 500).sum(1)
    if density not in (Mode(-1), Mode(1.75)):  # infinite at the ends, 904 in the middle: the bins there need the cdf
        torch.testing.assert_close(share, density.cdf(edges).diff(), atol=2e-5, rtol=0)
    expected = density.cdf(edges).diff() * count
    filled = expected > 5
    chi_square = ((found - expected)[filled] ** 2 / expected[filled]).sum()
    assert chi_square < 82 and (found[~filled] < 25).all()


@pytest.mark.parametrize("density", ALL + SHIFTED, ids=str)
def test_cdf_is_the_inverse_of_quantile(density):
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(density.cdf(density.quantile(u)), u, atol=1e-9, rtol=0)
    torch.testing.assert_close(density.cdf(float64(0, 1)), float64(0, 1), atol=1e-8, rtol=0)  # Mode(-1) is flat there


def test_the_lower_tail_of_a_logit_normal_is_exact():
    """EDM's grid goes down to where P(T <= t) is 1e-35."""
    low = LogitNormal(0.0, 0.5).cdf(torch.sigmoid(float64(-5.0)))
    assert float(low) == pytest.approx(7.619853024160527e-24, rel=1e-9)  # Phi(-10)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_a_shifted_density_is_a_change_of_variables(alpha):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    closed_form = LogitNormal(0.2 + math.log(alpha), 0.7)
    shifted = Shifted(LogitNormal(0.2, 0.7), alpha)
    torch.testing.assert_close(shifted.density(t), closed_form.density(t))
    torch.testing.assert_close(shifted.cdf(t), closed_form.cdf(t))
    torch.testing.assert_close(Shifted(Uniform(), alpha).density(t), alpha / (alpha + (1 - alpha) * t) ** 2)
    torch.testing.assert_close(Shifted(shifted, 1 / alpha).density(t), LogitNormal(0.2, 0.7).density(t))


def test_steps_are_equally_likely():
    steps = Steps(4)
    assert steps.quantile(float64(0, 0.24, 0.25, 0.6, 0.99, 1)).tolist() == [0.25, 0.25, 0.5, 0.75, 1, 1]
    assert steps.cdf(float64(0, 0.2, 0.25, 0.6, 1)).tolist() == [0, 0, 0.25, 0.5, 1]
    drawn = Steps(1000).sample(100_000, torch.Generator().manual_seed(0))
    counts = torch.bincount((drawn * 1000).round().long(), minlength=1001)[1:]
    assert counts.sum() == 100_000 and (((counts - 100) ** 2 / 100).sum() - 999).abs() < 4 * (2 * 999) ** 0.5
