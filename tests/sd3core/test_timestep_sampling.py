import pytest
import torch
from scipy import integrate

from sd3core.errors import UserError
from sd3core.rectified_flow import resolution_shift
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, Uniform

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
    with pytest.raises(UserError, match="std"):
        LogitNormal(0, 0)
