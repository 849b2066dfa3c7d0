"""Sampling a known distribution by every formulation: a one-dimensional mixture whose best prediction is a closed form.

The stand-in network is written from the textbook forms and sees only what a network sees, its scaled input and its
time. The prior's quantiles go in and the ODE keeps their order, so what comes out is compared with the mixture's
quantiles without any chance in it.
"""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from sd3core.formulation_names import EDM_RF_WEIGHT
from sd3core.formulations import FORMULATIONS, find_formulation
from sd3core.sampling import SAMPLERS, guided, sample_euler, sigma_schedule, solve

MEANS = torch.tensor([-1.3, 0.75], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
STD = 0.3  # of each part; that of the whole is 0.987
LDM_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LDM_SIGNAL = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - LDM_BETAS, 0)])
COUNT = 200
U = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
NOISE = torch.special.ndtri(U)
KINDS = ("rf", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)", "edm/rf", "edm/cos")


def mixture_quantiles():
    low, high = torch.full_like(U, -9), torch.full_like(U, 9)
    for _ in range(50):
        middle = (low + high) / 2
        below = (SHARES * torch.special.ndtr((middle[:, None] - MEANS) / STD)).sum(1) < U
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def mean_of_x0(z, a, b):
    """E[x0 | a x0 + b noise = z]."""
    a, b, z = a[:, None], b[:, None], z[:, None]
    variance = a**2 * STD**2 + b**2
    part = torch.softmax(SHARES.log() - (z - a * MEANS) ** 2 / (2 * variance), 1)
    return (part * (MEANS + a * STD**2 / variance * (z - a * MEANS))).sum(1)


def network(name):
    """(z_in, t_in) -> the best output of this formulation."""

    def edm(z_in, t_in):
        sigma = torch.exp(4 * t_in.double())
        h = torch.sqrt(sigma**2 + 0.25)
        z = z_in.double() * h
        return (mean_of_x0(z, torch.ones_like(z), sigma) - 0.25 / h**2 * z) / (0.5 * sigma / h)

    def straight_or_round(z, t):
        z, t = z.double(), t.double()
        if name.startswith("rf"):
            a, b = 1 - t, t
        elif name.endswith("cos"):
            a, b = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        else:
            step = (1000 * t).floor().long().clamp(0, 999)
            signal = torch.exp(torch.lerp(LDM_SIGNAL[step].log(), LDM_SIGNAL[step + 1].log(), 1000 * t - step))
            a, b = signal.sqrt(), (1 - signal).sqrt()
        x0 = mean_of_x0(z, a, b)
        noise = (z - a * x0) / b
        return {"rf": noise - x0, "ep": noise, "v/": a * noise - b * x0}[name[:2]]

    return edm if name.startswith("edm") else straight_or_round


def sampled(formulation, num_steps, predict=None):
    velocity = formulation.as_rectified_flow(predict or network(formulation.name))
    return sample_euler(velocity, formulation.start(NOISE), formulation.sigmas(num_steps, "textbook"))


def distance(samples):
    """Mean distance of the sorted samples from the mixture's quantiles (Wasserstein 1)."""
    return float((samples.sort().values - mixture_quantiles()).abs().mean())


@pytest.mark.parametrize("name", KINDS)
def test_the_mixture_comes_back(name):
    """Within 0.07 of it at 25 Euler steps and 0.012 at 200: the error of Euler, halved by twice the steps, and of the
    prior.
    """
    formulation = find_formulation(name)
    coarse, fine = distance(sampled(formulation, 25)), distance(sampled(formulation, 200))
    assert coarse < 0.07 and fine < 0.012 and fine < coarse / 2


@pytest.mark.parametrize("sampler", ["heun", "dpm++2m"])
@pytest.mark.parametrize("name", KINDS)
def test_every_solver_serves_every_formulation(name, sampler):
    """At 40 steps the second-order solvers are nearer to what 1000 of Euler give than Euler is: by half, but for linear, whose
    last step, Euler's with each, begins at b = 0.16.
    """
    formulation = find_formulation(name)
    velocity, start = formulation.as_rectified_flow(network(name)), formulation.start(NOISE)
    exact = sample_euler(velocity, start, formulation.sigmas(1000, "textbook"))
    by_solver, by_euler = (
        (solve(velocity, start, formulation.sigmas(40, "textbook")) - exact).abs().mean()
        for solve in (SAMPLERS[sampler], sample_euler)
    )
    assert by_solver < by_euler * (0.9 if "linear" in name else 0.5)


@pytest.mark.parametrize("name", KINDS)
def test_the_sde_serves_every_formulation(name):
    """Sorted, twenty samples to a quantile: a random error of up to 0.02 stays."""
    formulation, draws = find_formulation(name), torch.Generator().manual_seed(0)

    def fresh():
        return torch.randn(20 * COUNT, generator=draws, dtype=torch.float64)

    velocity, start = formulation.as_rectified_flow(network(name)), formulation.start(fresh())
    found = solve("dpm++2m-sde", velocity, start, formulation.sigmas(100, "textbook"), fresh=fresh)
    assert distance(found.sort().values.view(COUNT, 20).mean(1)) < 0.03


def test_all_61_bring_it_back():
    """Those whose training hardly shows noise (edm(-1.20,0.60): no sigma above 4) begin sampling with some signal left."""
    errors = {name: distance(sampled(find_formulation(name), 100)) for name in (*FORMULATIONS, EDM_RF_WEIGHT)}
    assert max(errors.values()) < 0.035, errors
    assert sum(error > 0.02 for error in errors.values()) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_step_keeps_the_predicted_data_and_noise(name):
    """Euler on the straight path is z_s = a_s x0 + b_s noise on the formulation's own: DDIM's step, and Euler in sigma
    for EDM.
    """
    formulation, predict = find_formulation(name), network(name)
    grid = formulation.sampling_grid(6)
    (a, b), steps = formulation.a_b(grid), []
    z_own = formulation.prior_scale * NOISE.clone()
    sample_euler(
        formulation.as_rectified_flow(predict),
        formulation.start(NOISE),
        (b / (a + b)),
        on_step=lambda i, z: steps.append(z * (a + b)[i + 1]),
    )
    for i, found in enumerate(steps):
        t = grid[i].expand(COUNT)
        x0 = mean_of_x0(z_own, a[i].expand(COUNT), b[i].expand(COUNT)) if i else None
        output = predict(*formulation.network_inputs(z_own, t))
        x0_found = formulation.x0(output, z_own, t)
        if x0 is not None:
            torch.testing.assert_close(x0_found, x0, rtol=1e-4, atol=1e-4)
        z_own = a[i + 1] * x0_found + b[i + 1] * (z_own - a[i] * x0_found) / b[i]
        torch.testing.assert_close(found, z_own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_velocity_is_the_slope_of_the_own_path(name):
    """An adaptive solver on dz/dt, from the grid's start to b = 0.03, and the same in the coordinates that sampling
    takes.
    """
    formulation, predict = find_formulation(name), network(name)
    noise = NOISE[10::20]
    ends = formulation.sampling_grid(1000)[[0, -2]]
    a, b = formulation.a_b(ends)

    def own(t, z):
        z, t = torch.from_numpy(z), torch.full((len(z),), t, dtype=torch.float64)
        return formulation.velocity(predict(*formulation.network_inputs(z, t)), z, t).numpy()

    def straight(t, y):
        y, t = torch.from_numpy(y), torch.full((len(y),), t, dtype=torch.float64)
        return formulation.as_rectified_flow(predict)(y, t).numpy()

    exact = {"rtol": 1e-5, "atol": 1e-7}
    z = solve_ivp(own, ends.tolist(), (formulation.prior_scale * noise).numpy(), **exact).y[:, -1]
    y = solve_ivp(straight, (b / (a + b)).tolist(), formulation.start(noise).numpy(), **exact).y[:, -1]
    torch.testing.assert_close(torch.from_numpy(z), torch.from_numpy(y) * (a + b)[1], rtol=1e-3, atol=2e-3)


def test_grids_begin_and_end_where_they_say():
    for name, formulation in FORMULATIONS.items():
        grid, sigmas = formulation.sampling_grid(9), formulation.sigmas(9)
        assert grid.shape == sigmas.shape == (10,) and grid[-1] == sigmas[-1] == 0, name
        assert (grid.diff() < 0).all() and (sigmas.diff() < 0).all() and grid[0] <= 1, name
    rf = find_formulation("rf")
    assert rf.sampling_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0] and rf.prior_scale == 1
    assert torch.equal(rf.shifted(3.0).sigmas(7), sigma_schedule(7, shift=3.0))
    assert torch.equal(rf.start(NOISE), NOISE)
    linear = find_formulation("eps/linear")
    assert (1000 * linear.sampling_grid(7)).tolist() == pytest.approx([1000, 857, 714, 571, 429, 286, 143, 0])
    assert linear.prior_scale == pytest.approx(1) and float(linear.a_b(linear.sampling_grid(7)[:1])[0]) > 0.068
    assert len(linear.sampling_grid(3000).unique()) == 3001
    assert float(
        find_formulation("eps/cos").log_snr(find_formulation("eps/cos").sampling_grid(1)[:1])
    ) == pytest.approx(-5.36, abs=0.01)


def test_edm_takes_karras_grid():
    """sigma_i = (80^(1/7) + i/(N-1) (0.002^(1/7) - 80^(1/7)))^7, then 0; where 80 is beyond t = 1 - 1e-5, from there."""
    edm = find_formulation("edm(0.00,1.20)")
    expected = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)] + [0]
    assert edm.a_b(edm.sampling_grid(10))[1].tolist() == pytest.approx(expected, rel=1e-6)
    assert edm.prior_scale == pytest.approx(math.hypot(1, 80))
    low = find_formulation("edm(-1.20,0.60)")
    assert float(low.sampling_grid(10)[0]) == pytest.approx(1 - 1e-5, abs=1e-9)
    assert float(low.a_b(low.sampling_grid(10))[1][0]) == pytest.approx(math.exp(-1.2 + 0.6 * 4.26489), rel=1e-4)


@pytest.mark.parametrize("name", ["eps/linear", "v/cos", "edm/rf"])
def test_guidance_of_outputs_is_guidance_of_velocities(name):
    formulation = find_formulation(name)

    def null(z, t):
        return 0.3 * z + t.to(z.dtype)

    of_outputs = formulation.as_rectified_flow(guided(network(name), null, 4.0))
    of_velocities = guided(*(formulation.as_rectified_flow(part) for part in (network(name), null)), 4.0)
    z, t = NOISE, 0.05 + 0.8 * U
    torch.testing.assert_close(of_outputs(z, t), of_velocities(z, t))
