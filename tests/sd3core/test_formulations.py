"""The 61 against closed forms: names, paths, weights against losses, predictions, shift, bounds."""

import math

import pytest
import torch
from torch import tensor

from sd3core.errors import UserError
from sd3core.formulation_names import EDM_RF_WEIGHT, family, shift_problem
from sd3core.formulations import FORMULATIONS, find_formulation
from sd3core.formulations.trajectories import Linear
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, Uniform

ONE_OF_EACH = ("rf/lognorm(0.00,1.00)", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)", "edm/rf")
T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def float64(*values):
    return tensor(values, dtype=torch.float64)


def slope_of_log_snr(formulation, t):
    """lambda' by differences; those of the discrete linear schedule are taken inside the interval below t."""
    low, high = (t - 3e-6, t - 1e-6) if "linear" in formulation.name else (t - 1e-6, t + 1e-6)
    return (formulation.log_snr(high) - formulation.log_snr(low)) / (high - low)


def test_the_61_are_named_as_printed():
    groups = [name.split("(")[0] for name in FORMULATIONS]
    assert {group: groups.count(group) for group in groups} == {
        "rf": 1, "rf/cosmap": 1, "rf/lognorm": 30, "rf/mode": 8, "edm": 15, "edm/rf": 1, "edm/cos": 1,
        "eps/linear": 1, "v/linear": 1, "eps/cos": 1, "v/cos": 1,
    }  # fmt: skip
    assert len(FORMULATIONS) == 61
    printed = "rf rf/cosmap rf/lognorm(0.00,1.00) rf/lognorm(1.00,0.60) rf/lognorm(-0.50,1.00) rf/mode(1.29)"
    printed += " eps/linear v/linear v/cos edm/cos edm/rf edm(0.00,0.60) edm(0.60,1.20) edm(-1.20,1.20)"
    assert set(printed.split()) <= set(FORMULATIONS)
    assert all(name == formulation.name for name, formulation in FORMULATIONS.items())
    assert find_formulation("rf/lognorm(-0.50,1.00)").timestep_density == LogitNormal(-0.5, 1.0)
    assert find_formulation("rf/mode(1.29)").timestep_density == Mode(-1 + 2.75 * 5 / 6)  # 1.291667, printed as 1.29


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if "(" in name])
def test_the_name_says_the_parameters(name):
    parameters = [float(p) for p in name.partition("(")[2].rstrip(")").split(",")]
    formulation = find_formulation(name)
    density = formulation.trajectory.levels if name.startswith("edm") else formulation.timestep_density
    assert parameters == pytest.approx(list(vars(density).values()), abs=0.0051)


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(UserError, match="did you mean"):
        find_formulation("")


def test_families():
    groups = {}
    for name in (*FORMULATIONS, EDM_RF_WEIGHT):
        groups[family(name)] = groups.get(family(name), 0) + 1
    assert groups == {"rf": 40, "edm": 18, "eps/linear": 1, "v/linear": 1, "eps/cos": 1, "v/cos": 1}
    for name in FORMULATIONS:  # a family is one prediction, and one time for each noise level
        found, first = find_formulation(name), find_formulation({"rf": "rf", "edm": "edm/rf"}.get(family(name), name))
        assert type(found.prediction) is type(first.prediction)
        assert torch.equal(found.trajectory.level_at(T).time, first.trajectory.level_at(T).time)


@pytest.mark.parametrize("name", [*FORMULATIONS, EDM_RF_WEIGHT])
def test_the_loss_is_its_weighted_form(name):
    """loss = -1/2 w lambda' ||error of the noise||^2 for a network that is wrong about the noise by 0.1 (L_w, paper 2)."""
    formulation = find_formulation(name)
    t = formulation.quantile(T)
    t = t[(t > 0.01) & (t < 0.99)]
    x0, noise = torch.randn(2, len(t), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (part[:, None] for part in formulation.a_b(t))
    wrong_noise = noise + 0.1
    wrong_x0 = (a * x0 + b * noise - b * wrong_noise) / a
    loss = formulation.loss(lambda z, s: formulation.prediction.target(wrong_x0, wrong_noise, a, b), x0, noise, t)
    expected = -0.5 * formulation.weight(t) * slope_of_log_snr(formulation, t) * 0.1**2
    torch.testing.assert_close(loss.double(), expected, rtol=2e-4, atol=0)


def test_weights_are_the_papers():
    """Table of paper section 3, up to the factors it leaves out; EDM's contains the density of the log-SNR."""
    torch.testing.assert_close(find_formulation("rf").weight(T), T / (1 - T))
    for name, factor, weight in (
        ("eps/cos", 1 / math.pi, lambda log_snr: 1 / torch.cosh(log_snr / 2)),
        ("v/cos", 2 / math.pi, lambda log_snr: torch.exp(-log_snr / 2)),
    ):
        formulation = find_formulation(name)
        torch.testing.assert_close(formulation.weight(T), factor * weight(formulation.log_snr(T)))
    for mean, std in ((-1.2, 1.2), (0.6, 0.6)):
        edm = find_formulation(f"edm({mean:.2f},{std:.2f})")
        log_snr = edm.log_snr(T)
        density = torch.exp(torch.distributions.Normal(-2 * mean, 2 * std).log_prob(log_snr))
        torch.testing.assert_close(edm.weight(T), 8 * density * (torch.exp(-log_snr) + 0.5**2))
    other = find_formulation(EDM_RF_WEIGHT)
    ratio = other.weight(T) / torch.exp(-other.log_snr(T) / 2)
    torch.testing.assert_close(ratio, ratio[:1].expand(len(T)))  # e^(-lambda/2), as rf's and v/cos's


def test_paths_are_the_papers():
    third = float64(1 / 3)
    for name, a, b in (
        ("rf", 2 / 3, 1 / 3),
        ("v/cos", 3**0.5 / 2, 1 / 2),
        ("edm/rf", 1, 1 / 2),
        ("edm/cos", 1, 3**-0.5),
        (EDM_RF_WEIGHT, 1, 3**-0.5 / 2),
    ):
        torch.testing.assert_close(torch.cat(find_formulation(name).a_b(third)), float64(a, b))
    one_sigma = torch.special.ndtr(float64(0.0, 1.0, -2.0))
    expected = torch.exp(-1.2 + 1.2 * float64(0.0, 1.0, -2.0))
    torch.testing.assert_close(find_formulation("edm(-1.20,1.20)").a_b(one_sigma)[1], expected)


def test_a_fresh_draws_log_snr_has_the_named_density():
    """edm(m, s) and rf/lognorm(m, s): N(-2m, (2s)^2); rf: logistic; cosine: hyperbolic secant (sd3-facts: p(lambda) for
    t uniform).
    """
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    normal = torch.distributions.Normal(float64(1.2), float64(2 * 1.2))
    for name, cdf in (
        ("edm(-0.60,1.20)", normal.cdf),
        ("rf", lambda x: torch.sigmoid(x / 2)),
        ("edm/rf", lambda x: torch.sigmoid(x / 2)),
        ("v/cos", lambda x: 2 / math.pi * torch.atan(torch.exp(x / 2))),
        ("edm/cos", lambda x: 2 / math.pi * torch.atan(torch.exp(x / 2))),
        (EDM_RF_WEIGHT, lambda x: 2 / math.pi * torch.atan(torch.exp(x / 2 - math.log(2)))),
    ):
        formulation = find_formulation(name)
        log_snr = formulation.log_snr(formulation.quantile(u))
        torch.testing.assert_close(cdf(log_snr), 1 - u, atol=1e-7, rtol=0)


def test_the_linear_schedules():
    """LDM's and DDPM's cumulated products, as sd3-facts 1.3 has them, and that they are products of 1 - beta."""
    for linear, signal, first, last in (
        (Linear(), 0.004660, 7.0694, -5.3640),
        (Linear(1e-4, 0.02, even_in="beta"), 4.036e-5, 9.2102, -10.1177),
    ):
        assert float(linear.level(float64(1.0)).a ** 2) == pytest.approx(signal, rel=1e-3)
        for t, log_snr in ((1 / 1000, first), (1.0, last)):
            a, b, time = linear.level(float64(t))
            assert float(2 * (a / b).log()) == pytest.approx(log_snr, abs=1e-3) and float(time) == t
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    steps = torch.arange(1, 1001) / 1000  # float32, as training draws them
    torch.testing.assert_close(Linear().level(steps).a ** 2, torch.cumprod(1 - betas, 0), rtol=1e-6, atol=0)
    drawn = find_formulation("eps/linear").sample_t(5000, torch.Generator().manual_seed(0)) * 1000
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-4)
    assert drawn.min() >= 1 and drawn.max() <= 1000


@pytest.mark.parametrize("name", [*ONE_OF_EACH, EDM_RF_WEIGHT])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_a_level_is_the_same_by_either_time(name, alpha):
    formulation = find_formulation(name)
    if alpha != 1 and "linear" in name:
        return
    shifted = formulation.shifted(alpha)
    t = shifted.quantile(T)
    if formulation.name == "eps/cos":
        t = t * 0.95  # sampling begins before t = 1
    torch.testing.assert_close(shifted.trajectory.level_at(shifted.rf_time(t)), shifted.trajectory.level(t))
    da, db = shifted.trajectory.slopes(t - 1e-5)
    (a, b), (before_a, before_b) = shifted.a_b(t), shifted.a_b(t - 2e-5)
    torch.testing.assert_close((a - before_a) / 2e-5, da, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((b - before_b) / 2e-5, db, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_network_that_knows_all_has_no_loss_and_gives_back_the_data(name):
    formulation = find_formulation(name)
    t = formulation.quantile(T[::3]).float()
    x0, noise = torch.randn(2, len(t), 2, 3, 3, generator=torch.Generator().manual_seed(0))
    a, b = (part.view(-1, 1, 1, 1) for part in formulation.a_b(t))
    output = formulation.prediction.target(x0, noise, a, b)
    assert formulation.loss(lambda z, s: output, x0, noise, t).max() < 1e-10
    z_t = formulation.add_noise(x0, noise, t)
    torch.testing.assert_close(z_t, a * x0 + b * noise)
    torch.testing.assert_close(formulation.x0(output, z_t, t), x0, atol=1e-4, rtol=1e-4)
    da, db = (part.view(-1, 1, 1, 1).float() for part in formulation.trajectory.slopes(t))
    torch.testing.assert_close(formulation.velocity(output, z_t, t), da * x0 + db * noise, atol=1e-4, rtol=1e-4)
    velocity = formulation.as_rectified_flow(lambda z, s: output)(z_t / (a + b), formulation.rf_time(t))
    torch.testing.assert_close(velocity, noise - x0, atol=1e-4, rtol=1e-4)


def test_the_network_is_shown_what_edm_scales():
    """c_skip z + c_out F(c_in z, c_noise) = x0, with the constants of Karras et al. at sigma = 1."""
    edm, seen = find_formulation("edm(0.00,1.20)"), []
    x0, noise, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.5, 0.5])
    edm.loss(lambda z, s: seen.extend([z, s]) or z, x0, noise, t)
    torch.testing.assert_close(seen[0], 0.894427 * (x0 + noise), rtol=1e-5, atol=1e-6)
    assert seen[1].abs().max() < 1e-7
    target = edm.prediction.target(x0, noise, torch.ones(2, 1), torch.ones(2, 1))
    torch.testing.assert_close(0.2 * (x0 + noise) + 0.447214 * target, x0, rtol=1e-5, atol=1e-5)
    _, time = edm.network_inputs(x0, torch.special.ndtr(torch.tensor([2.0, 2.0]) / 1.2))
    torch.testing.assert_close(time.float(), torch.tensor([0.5, 0.5]), rtol=1e-5, atol=0)  # sigma = e^2


def test_rectified_flow_hands_on_the_noisy_latent_t_and_the_output():
    rf, seen = find_formulation("rf"), []
    x0, noise, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.25, 1.0])
    rf.loss(lambda z, s: seen.extend([z, s]) or z, x0, noise, t)
    assert torch.equal(seen[1], t) and torch.equal(seen[0][1], noise[1])
    assert torch.equal(seen[0], (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise)
    assert torch.equal(rf.velocity(noise, x0, t), noise) and torch.equal(rf.rf_time(t), t)
    assert rf.as_rectified_flow(len) is len
    assert rf.loss(lambda z, s: noise - x0, x0, noise, t).tolist() == [0, 0]


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if "linear" not in name])
def test_a_shift_lowers_every_log_snr(name):
    formulation, u = find_formulation(name), float64(0.1, 0.35, 0.5, 0.65, 0.9)
    shifted = formulation.shifted(3.0)
    fall = formulation.log_snr(formulation.quantile(u)) - shifted.log_snr(shifted.quantile(u))
    torch.testing.assert_close(fall, torch.full_like(u, 2 * math.log(3)))
    before, after = (f.sigmas(5, "textbook").double() for f in (formulation, shifted))
    torch.testing.assert_close(after, 3 * before / (1 + 2 * before), rtol=1e-6, atol=1e-7)
    assert formulation.shifted(1.0) is formulation


def test_a_shifted_edm_is_the_edm_of_a_larger_mean():
    shifted, u = find_formulation("edm(-0.60,0.60)").shifted(math.exp(0.6)), T
    other = find_formulation("edm(0.00,0.60)")
    torch.testing.assert_close(shifted.a_b(u)[1], other.a_b(u)[1])
    torch.testing.assert_close(shifted.weight(u), other.weight(u))
    twice = find_formulation("v/cos").shifted(2.0).shifted(1.5)
    torch.testing.assert_close(twice.log_snr(u), find_formulation("v/cos").shifted(3.0).log_snr(u))


def test_draws_are_finite_to_the_last_bit():
    """float32 rounds t up to 1, where EDM's sigma would be infinite; losses stay finite there, and at t = 0."""
    x0, noise, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.0, 1.0 - 2**-24, 1.0])
    for name in FORMULATIONS:
        for alpha in (1.0, 3.0)[: 1 if shift_problem(name, 3.0) else 2]:
            losses = find_formulation(name).shifted(alpha).loss(lambda z, s: z + s[:, None], x0, noise, t)
            assert losses.isfinite().all(), name


def test_bounds():
    for name in ("eps/linear", "v/linear"):
        with pytest.raises(UserError, match="no shift"):
            find_formulation(name).shifted(3.0)
        assert shift_problem(name, 1.0) is None and name in shift_problem(name, 3.0)
    assert shift_problem("edm/rf", 3.0) is None
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="shift must be positive"):
            find_formulation("rf").shifted(bad)
    with pytest.raises(UserError, match="num_steps must be at least 1"):
        find_formulation("edm/rf").sampling_grid(0)
    for betas in ((0, 0.1), (0.2, 0.1), (0.1, 1.0), (0.1, 0.2, 0)):
        with pytest.raises(UserError, match="Linear: betas must rise"):
            Linear(*betas)


def test_unpaired_parameters_have_a_uniform_t():
    for name in ("v/cos", "edm/rf", "edm(0.60,1.80)"):
        assert find_formulation(name).timestep_density == Uniform()
    assert find_formulation("edm/cos").trajectory.levels == CosMap()
