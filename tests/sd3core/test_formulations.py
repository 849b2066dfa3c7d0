import pytest
import torch

from sd3core.errors import UserError
from sd3core.formulations import FORMULATIONS, find_formulation
from sd3core.timestep_sampling import LogitNormal, Mode


def test_the_family_is_complete_and_named_as_printed():
    groups = [name.split("(")[0] for name in FORMULATIONS]
    assert {group: groups.count(group) for group in groups} == {"rf": 1, "rf/cosmap": 1, "rf/lognorm": 30, "rf/mode": 8}
    printed = "rf rf/cosmap rf/lognorm(0.00,1.00) rf/lognorm(1.00,0.60) rf/lognorm(-0.50,1.00) rf/mode(1.29)"
    assert set(printed.split()) <= set(FORMULATIONS)
    assert all(name == formulation.name for name, formulation in FORMULATIONS.items())
    assert find_formulation("rf/lognorm(-0.50,1.00)").timestep_density == LogitNormal(-0.5, 1.0)
    assert find_formulation("rf/mode(1.29)").timestep_density == Mode(-1 + 2.75 * 5 / 6)  # 1.291667, printed as 1.29


@pytest.mark.parametrize("name", list(FORMULATIONS))
def test_the_name_says_the_parameters(name):
    parameters = [float(p) for p in name.partition("(")[2].rstrip(")").split(",") if p]
    density = find_formulation(name).timestep_density
    assert parameters == pytest.approx(list(vars(density).values()), abs=0.0051)


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'rf/lognorm\\(0.00,1.00\\)'"):
        find_formulation("rf/lognorm(0,1)")
    with pytest.raises(UserError, match="did you mean"):
        find_formulation("")


def test_a_network_that_knows_the_velocity_has_no_loss_and_gives_back_the_data():
    rf = find_formulation("rf/lognorm(0.00,1.00)")
    x0, noise, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.rand(5)
    assert rf.loss(lambda z, s: noise - x0, x0, noise, t).tolist() == [0] * 5
    z_t = rf.add_noise(x0, noise, t)
    torch.testing.assert_close(rf.x0(noise - x0, z_t, t), x0)
    assert torch.equal(rf.velocity(z_t, z_t, t), z_t)
    torch.testing.assert_close(rf.loss(lambda z, s: 0 * z, x0, noise, t), (noise - x0).square().mean((1, 2, 3)))


def test_loss_hands_the_network_the_noisy_latent_and_t():
    rf, seen = find_formulation("rf"), []
    x0, noise, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.25, 1.0])
    rf.loss(lambda z, s: seen.extend([z, s]) or z, x0, noise, t)
    assert torch.equal(seen[1], t) and torch.equal(seen[0][1], noise[1])


def test_weight_is_what_the_velocity_loss_is_in_the_common_form():
    """||dv||^2 = ||deps||^2 / (1-t)^2 and L_w = -1/2 E[w lambda' ||deps||^2] (paper 2): w = -2 / (lambda' (1-t)^2)."""
    rf, t = find_formulation("rf"), torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rf.log_snr(t).sum(), t)
    torch.testing.assert_close(rf.weight(t), -2 / (slope * (1 - t) ** 2))
    torch.testing.assert_close(rf.weight(t), torch.exp(-rf.log_snr(t) / 2))
    a, b = rf.a_b(t)
    torch.testing.assert_close(rf.log_snr(t), torch.log(a**2 / b**2))


def test_sampling_grid():
    assert find_formulation("rf").sampling_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert find_formulation("rf").prior_scale == 1
