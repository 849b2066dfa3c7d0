import itertools

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from sd3core.errors import UserError
from sd3core.sampling import (
    SAMPLERS,
    guided,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_heun,
    sigma_schedule,
    solve,
)

ODE = {name: sampler for name, sampler in SAMPLERS.items() if name != "dpm++2m-sde"}

REFERENCE_28 = """
 1 .987381 .974108 .960129 .945387 .929818 .913349 .8959 .877382 .857692 .836717 .814325 .790368 .764677
 .737056 .707278 .675082 .64016 .602151 .560625 .515072 .464876 .409289 .347393 .278049 .199827 .110906 .008929 0"""


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(28, REFERENCE_28), (5, "1 .900359 .751121 .502985 .008929 0"), (4, "1 .857692 .602151 .008929 0"), (1, "1 0")],
)
def test_reference_goldens_at_shift_3(steps, expected):
    torch.testing.assert_close(
        sigma_schedule(steps, shift=3.0), torch.tensor([float(s) for s in expected.split()]), atol=1e-6, rtol=0
    )


def test_reference_sums():
    assert abs(sigma_schedule(28, shift=3.0).double().sum().item() - 18.803926) < 1e-5
    assert abs(sigma_schedule(50, shift=3.0).double().sum().item() - 33.724821) < 1e-5
    assert abs(sigma_schedule(50, shift=1.0).double().sum().item() - 25.025) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 4.0])
def test_reference_is_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(sigma_schedule(steps, shift=shift), scheduler.sigmas, atol=1e-6, rtol=0)


def test_textbook():
    sigmas = sigma_schedule(28, shift=3.0, convention="textbook")
    expected = torch.tensor([1, 0.987805, 0.975, 0.961538, 0.264706, 0.1875, 0.1, 0])
    torch.testing.assert_close(sigmas[[0, 1, 2, 3, 25, 26, 27, 28]], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(sigma_schedule(4, shift=1.0, convention="textbook"), torch.linspace(1, 0, 5))


def test_refusals():
    for num_steps, shift, convention in ((0, 3.0, "reference"), (4, 0.0, "reference"), (4, 1.0, "x")):
        with pytest.raises(UserError, match="sigma_schedule"):
            sigma_schedule(num_steps, shift=shift, convention=convention)


def draws_like(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(noise.shape, generator=generator)


@pytest.mark.parametrize("sampler", ODE.values())
@pytest.mark.parametrize("convention", ["reference", "textbook"])
def test_a_constant_velocity_is_solved_exactly(sampler, convention):
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 2, 7):
        out = sampler(lambda z, t: noise - x0, noise, sigma_schedule(steps, shift=3.0, convention=convention))
        torch.testing.assert_close(out, x0, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_data_set_of_one_point_is_found(sampler):
    """And on the way there z_t is (1 - t) point + t noise: of the SDE, some other noise."""
    point, noise = torch.tensor([[2.0]]), torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))

    def end_at(sigmas):
        return solve(sampler, lambda z, t: (z - point) / t[:, None], noise, sigmas, fresh=draws_like(noise, seed=1))

    torch.testing.assert_close(end_at(sigma_schedule(5, shift=3.0)), point.expand(4096, 1), atol=1e-5, rtol=0)
    on_the_way = end_at(torch.tensor([1, 0.8, 0.6, 0.4, 0.3]))
    assert on_the_way.mean().item() == pytest.approx(0.7 * 2, abs=0.02)
    assert on_the_way.std().item() == pytest.approx(0.3, abs=0.01)


SPREAD = 0.5  # of Gaussian data N(0, SPREAD^2)


def gaussian_std(t):
    """Of z_t; a path of the flow keeps z_t / gaussian_std(t)."""
    return ((1 - t) ** 2 * SPREAD**2 + t**2) ** 0.5


def gaussian_velocity(z, t):
    """z times d/dt ln gaussian_std(t)."""
    t = t[:, None].to(z.dtype)
    return z * (t - (1 - t) * SPREAD**2) / gaussian_std(t) ** 2


def gaussian_error(sampler, sigmas) -> float:
    """Relative to where the exact path ends."""
    first, last = gaussian_std(sigmas[0]), gaussian_std(sigmas[-1])
    start = first * torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    end = start * last / first
    return ((sampler(gaussian_velocity, start, sigmas) - end).norm() / end.norm()).item()


@pytest.mark.parametrize(("name", "order", "largest"), [("euler", 1, 8e-3), ("heun", 2, 3e-5), ("dpm++2m", 2, 1.5e-4)])
def test_order_of_convergence(name, order, largest):
    """Twice the steps, 2^order times the accuracy: on an even grid inside (0, 1), where lambda is finite."""
    errors = [
        gaussian_error(SAMPLERS[name], torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64))
        for steps in (32, 64, 128)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)
    assert errors[-1] < largest


def test_second_order_pays_on_the_whole_way_from_noise_to_data():
    """At 50 calls of the network and with both ends, where lambda is infinite: 2M loses some of its order there."""
    error = {
        name: gaussian_error(sampler, sigma_schedule(steps, shift=1.0, convention="textbook").double())
        for (name, sampler), steps in zip(ODE.items(), (50, 25, 50), strict=True)
    }
    assert error["dpm++2m"] < error["euler"] / 7 and error["heun"] < error["euler"] / 7


def sde_std(steps: int, start: float, first: float = 0.9) -> float:
    """Of the SDE's end at sigma 0.1, without sampling error: as all is linear, its variance is the sum of the squared weights of the
    start and of every fresh noise.
    """
    sigmas = torch.linspace(first, 0.1, steps + 1, dtype=torch.float64)
    basis = torch.eye(steps + 1, dtype=torch.float64)  # one row of z for the start, one for each fresh noise
    noises = (row[:, None] for row in basis)
    end = sample_dpmpp_2m_sde(gaussian_velocity, start * next(noises), sigmas, fresh=lambda: next(noises))
    return end.norm().item()


def test_the_sde_has_the_marginals_of_the_flow():
    """Twice the steps, four times the accuracy."""
    exact = gaussian_std(torch.tensor(0.1, dtype=torch.float64)).item()
    errors = [abs(sde_std(steps, gaussian_std(torch.tensor(0.9)).item()) / exact - 1) for steps in (32, 64, 128)]
    assert errors[-1] < 5e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.05)


def test_the_sde_forgets_where_it_started_and_the_flow_does_not():
    first, last = (gaussian_std(torch.tensor(t, dtype=torch.float64)).item() for t in (0.99, 0.1))
    wrong, sigmas = 2 * first, torch.linspace(0.99, 0.1, 65, dtype=torch.float64)
    assert sde_std(64, start=wrong, first=0.99) == pytest.approx(last, rel=0.01)
    of_flow = sample_dpmpp_2m(gaussian_velocity, torch.tensor([[wrong]], dtype=torch.float64), sigmas)
    assert of_flow.item() == pytest.approx(2 * last, rel=0.01)


NOISE = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def curved(z, t):
    """A velocity that depends on t and, not linearly, on other elements of z."""
    t = t.view(-1, 1, 1, 1)
    return torch.tanh(1.5 * z.flip(-1)) * (1 + t) - 0.4 * z * (1 - t) + torch.cos(7 * t)


def through_diffusers(scheduler, sigma_of, fresh=None):
    """sigma_of(i, t): the level of the i-th call, whose t is the scheduler's."""
    scheduler.set_begin_index(0)
    z = NOISE
    for i, t in enumerate(scheduler.timesteps):
        noise = {} if fresh is None else {"variance_noise": fresh()}
        z = scheduler.step(curved(z, sigma_of(i, t).expand(len(z))), t, z, return_dict=False, **noise)[0]
    return z


def their_dpmpp_2m(sigmas, algorithm):
    """On our sigmas, which begin at 1: theirs would begin at 0.999."""
    theirs = DPMSolverMultistepScheduler(
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        algorithm_type=algorithm,
    )
    theirs.set_timesteps(len(sigmas) - 1)
    theirs.sigmas = sigmas
    return theirs


@pytest.mark.parametrize("convention", ["reference", "textbook"])
@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 1.0), (3, 3.0), (4, 1.0), (10, 3.0), (28, 1.0), (50, 3.0)])
def test_dpmpp_2m_is_diffusers(steps, shift, convention):
    """All of fp32's precision at values up to 8."""
    sigmas = sigma_schedule(steps, shift=shift, convention=convention)
    expected = through_diffusers(their_dpmpp_2m(sigmas, "dpmsolver++"), lambda i, t: sigmas[i])
    torch.testing.assert_close(sample_dpmpp_2m(curved, NOISE, sigmas), expected, atol=1e-5, rtol=0)
    if steps > 3:  # else every step is Euler's: the first two, and the last
        assert (sample_euler(curved, NOISE, sigmas) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("convention", ["reference", "textbook"])
@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 1.0), (4, 1.0), (10, 3.0), (50, 3.0)])
def test_dpmpp_2m_sde_is_diffusers(steps, shift, convention):
    sigmas = sigma_schedule(steps, shift=shift, convention=convention)
    theirs = their_dpmpp_2m(sigmas, "sde-dpmsolver++")
    expected = through_diffusers(theirs, lambda i, t: sigmas[i], draws_like(NOISE))
    ours = sample_dpmpp_2m_sde(curved, NOISE, sigmas, fresh=draws_like(NOISE))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28])
def test_heun_is_diffusers(steps):
    """Theirs divides by sigma after multiplying by it, which costs some digits."""
    theirs = FlowMatchHeunDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    expected = through_diffusers(theirs, lambda i, t: t / 1000)
    calls = []
    ours = sample_heun(lambda z, t: calls.append(t) or curved(z, t), NOISE, sigma_schedule(steps, shift=3.0))
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)
    assert len(calls) == len(theirs.timesteps) == 2 * steps - 1


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("euler", [1, 2 / 3, 1 / 3]),
        ("heun", [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]),
        ("dpm++2m", [1, 2 / 3, 1 / 3]),
        ("dpm++2m-sde", [1, 2 / 3, 1 / 3]),
    ],
)
def test_steps_are_reported_t_is_per_sample_and_the_dtype_is_kept(name, levels):
    steps, times = [], []

    def predict(z, t):
        assert z.dtype == torch.float32 and t.shape == (3,)
        times.append(t[0].item())
        return torch.zeros_like(z, dtype=torch.bfloat16)

    noise, sigmas = torch.ones(3, 2, dtype=torch.bfloat16), sigma_schedule(3, shift=1.0, convention="textbook")
    out = solve(name, predict, noise, sigmas, fresh=draws_like(noise), on_step=lambda i, z: steps.append(i))
    assert steps == [0, 1, 2] and times == pytest.approx(levels) and out.dtype == torch.bfloat16


def test_guidance():
    cond, null = (lambda z, t: z + 3), (lambda z, t: z + 1)
    z, t = torch.zeros(2, 2), torch.ones(2)
    assert guided(cond, null, 5.0)(z, t).unique().tolist() == [11.0]
    assert guided(cond, null, 1.0) is cond and guided(cond, null, 0.0) is null
