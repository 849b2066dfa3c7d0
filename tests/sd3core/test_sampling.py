import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sd3core.errors import UserError
from sd3core.sampling import guided, sample_euler, sigma_schedule

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


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0])
def test_reference_is_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
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


@pytest.mark.parametrize("convention", ["reference", "textbook"])
def test_euler_is_exact_on_a_constant_velocity(convention):
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 7):
        out = sample_euler(lambda z, t: noise - x0, noise, sigma_schedule(steps, shift=3.0, convention=convention))
        torch.testing.assert_close(out, x0, atol=1e-6, rtol=1e-5)


def test_euler_finds_a_point_and_converges_on_a_gaussian():
    point, noise = torch.tensor([[2.0]]), torch.randn(64, 1)
    out = sample_euler(lambda z, t: (z - point) / t[:, None], noise, sigma_schedule(5, shift=3.0))
    torch.testing.assert_close(out, point.expand(64, 1), atol=1e-5, rtol=0)
    # data N(0, s^2): z_t ~ N(0, var), velocity = z var'/(2 var), and the flow ends at s * noise
    s = 0.5

    def velocity(z, t):
        t = t[:, None]
        return z * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    grids = [sigma_schedule(n, shift=1.0, convention="textbook") for n in (50, 100, 200)]
    errors = [(sample_euler(velocity, noise, sigmas) - s * noise).norm() for sigmas in grids]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_euler_reports_steps_passes_t_per_sample_and_keeps_the_dtype():
    steps, times = [], []

    def predict(z, t):
        assert z.dtype == torch.float32 and t.shape == (3,)
        times.append(t[0].item())
        return torch.zeros_like(z, dtype=torch.bfloat16)

    noise, sigmas = torch.ones(3, 2, dtype=torch.bfloat16), sigma_schedule(3, shift=1.0, convention="textbook")
    out = sample_euler(predict, noise, sigmas, on_step=lambda i, z: steps.append(i))
    assert steps == [0, 1, 2] and times == pytest.approx([1, 2 / 3, 1 / 3]) and out.dtype == torch.bfloat16


def test_guidance():
    cond, null = (lambda z, t: z + 3), (lambda z, t: z + 1)
    z, t = torch.zeros(2, 2), torch.ones(2)
    assert guided(cond, null, 5.0)(z, t).unique().tolist() == [11.0]
    assert guided(cond, null, 1.0) is cond and guided(cond, null, 0.0) is null
