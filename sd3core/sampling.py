"""From noise to a latent: sigma schedules, guidance, and solvers.

The solvers are Euler, Heun, and DPM-Solver++(2M) as ODE and as SDE.

sigma is t. A solver is one function over a sequence of sigmas: (predict, noise (B, ...), sigmas (N + 1,)) -> latent
(B, ...); the SDE's also takes `fresh`, and `solve` calls any by its name. The sigmas descend and start at the noise's
level; only the last may be 0. The state is kept in float32 at least and comes back in noise's dtype. on_step(i, z) is
called after step i = 0 .. N - 1. Gradients are the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from sd3core.errors import UserError
from sd3core.rectified_flow import resolution_shift
from sd3core.sample_settings import Convention, Sampler

Predict = Callable[[Tensor, Tensor], Tensor]  # (z_t (B, ...), t (B,)) -> velocity (B, ...)
OnStep = Callable[[int, Tensor], None]
Fresh = Callable[[], Tensor]  # -> the next standard normal noise (B, ...), independent of all before
Step = Callable[[Tensor, float, float], Tensor]  # (z, sigma, next_sigma) -> z at next_sigma


def sigma_schedule(num_steps: int, *, shift: float, convention: Convention = "reference") -> Tensor:
    """Noise levels from 1 to 0, shifted for the resolution. (num_steps + 1,) float32.

    textbook   shift(1 - i / num_steps): the paper's formula (5.3.2) on an even grid.
    reference  what the released code does: an even grid from 1 to shift(1/1000), shifted once more, then 0. Its last
               step, from about 0.009 at shift 3, is nearly free, so it works like num_steps - 1.
    """
    if num_steps < 1 or not shift > 0:
        raise UserError(f"sigma_schedule: num_steps must be at least 1 and shift positive, not {num_steps} and {shift}")
    if convention == "textbook":
        return resolution_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()
    if convention == "reference":
        lowest = resolution_shift(1 / 1000, shift)
        grid = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
        return torch.cat([resolution_shift(grid, shift), torch.zeros(1, dtype=torch.float64)]).float()
    raise UserError(f"sigma_schedule: convention {convention!r}; take 'reference' or 'textbook'")


def guided(predict_cond: Predict, predict_null: Predict, guidance_scale: float) -> Predict:
    """null + scale * (cond - null). Scale 1 is no guidance, scale 0 no condition: then only one is called."""
    if guidance_scale == 1:
        return predict_cond
    if guidance_scale == 0:
        return predict_null

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        null = predict_null(z_t, t)
        return null + guidance_scale * (predict_cond(z_t, t) - null)

    return predict


def sample_euler(predict: Predict, noise: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """z <- z + (sigma_{i+1} - sigma_i) * velocity(z, sigma_i). First order, exact where the velocity is constant."""

    def step(z: Tensor, sigma: float, next_sigma: float) -> Tensor:
        return z + (next_sigma - sigma) * _velocity(predict, z, sigma)

    return _integrate(step, noise, sigmas, on_step)


def sample_heun(predict: Predict, noise: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Euler's step, then again with the mean of the velocities at both its ends (Karras et al. 2022, algorithm 1).

    Second order, two calls of the network a step. The step to sigma 0 is Euler's, because a velocity at t = 0 is never
    trained: N steps are 2 N - 1 calls.
    """

    def step(z: Tensor, sigma: float, next_sigma: float) -> Tensor:
        velocity = _velocity(predict, z, sigma)
        ahead = z + (next_sigma - sigma) * velocity
        if next_sigma == 0:
            return ahead
        return z + (next_sigma - sigma) * (velocity + _velocity(predict, ahead, next_sigma)) / 2

    return _integrate(step, noise, sigmas, on_step)


def sample_dpmpp_2m(predict: Predict, noise: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for rectified flow: second order, one call of the network a step.

    z <- (sigma' / sigma) z + (1 - sigma' / sigma) D, where D is x0 = z - sigma * velocity, carried on half a step along
    its change since the step before: D = x0 + h' / (2 h) (x0 - x0_before), h and h' being the steps behind and ahead in
    lambda = ln((1 - sigma) / sigma). With D = x0 it is Euler's step.

    lambda is infinite at both ends. The first step has none behind it, and for the second, h is infinite where sigmas
    start at 1: both take D = x0. So does the step to sigma 0. (The released SD3.5 code measures steps in -ln(sigma)
    instead, which is finite at 1 and gives other weights.) The textbook schedule suits it: in the reference schedule
    the step to the last, tiny sigma is so long in lambda that D overshoots.
    """
    return _dpmpp_2m(predict, noise, sigmas, None, on_step)


def sample_dpmpp_2m_sde(
    predict: Predict, noise: Tensor, sigmas: Tensor, *, fresh: Fresh, on_step: OnStep | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M): the same D for the SDE with the flow's marginals. Its fresh noise makes up for what the
    steps before got wrong.

    z <- k (sigma' / sigma) z + (1 - sigma' - k (1 - sigma) sigma' / sigma) D + sqrt(1 - k^2) sigma' fresh()

    k = e^-h' is the share of z's noise that is kept (1 would be the flow). It is 0 from sigma 1, where `noise` only
    decides the first D. The step to sigma 0 takes no fresh noise.
    """
    return _dpmpp_2m(predict, noise, sigmas, fresh, on_step)


def _dpmpp_2m(predict: Predict, noise: Tensor, sigmas: Tensor, fresh: Fresh | None, on_step: OnStep | None) -> Tensor:
    sigma_before = x0_before = None

    def step(z: Tensor, sigma: float, next_sigma: float) -> Tensor:
        nonlocal sigma_before, x0_before
        x0 = z - sigma * _velocity(predict, z, sigma)
        sigma_behind, x0_behind = sigma_before, x0_before
        sigma_before, x0_before = sigma, x0
        if next_sigma == 0:
            return x0
        ahead = x0
        if x0_behind is not None:
            h_behind = _half_log_snr(sigma) - _half_log_snr(sigma_behind)
            h_ahead = _half_log_snr(next_sigma) - _half_log_snr(sigma)
            ahead = x0 + h_ahead / (2 * h_behind) * (x0 - x0_behind)
        kept = 1.0 if fresh is None else (1 - sigma) * next_sigma / (sigma * (1 - next_sigma))
        of_z = kept * next_sigma / sigma
        moved = of_z * z + (1 - next_sigma - of_z * (1 - sigma)) * ahead
        return moved if fresh is None else moved + (1 - kept**2) ** 0.5 * next_sigma * fresh().to(z)

    return _integrate(step, noise, sigmas, on_step)


SAMPLERS: Mapping[Sampler, Callable[..., Tensor]] = MappingProxyType(
    {"euler": sample_euler, "heun": sample_heun, "dpm++2m": sample_dpmpp_2m, "dpm++2m-sde": sample_dpmpp_2m_sde}
)


def solve(
    sampler: Sampler, predict: Predict, noise: Tensor, sigmas: Tensor, *, fresh: Fresh, on_step: OnStep | None = None
) -> Tensor:
    """Samples by the sampler of that name; only that of an SDE calls `fresh`."""
    more = {"fresh": fresh} if SAMPLERS[sampler] is sample_dpmpp_2m_sde else {}
    return SAMPLERS[sampler](predict, noise, sigmas, on_step=on_step, **more)


def _integrate(step: Step, noise: Tensor, sigmas: Tensor, on_step: OnStep | None) -> Tensor:
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        z = step(z, sigma, next_sigma)
        if on_step is not None:
            on_step(i, z)
    return z.to(noise.dtype)


def _velocity(predict: Predict, z: Tensor, sigma: float) -> Tensor:
    return predict(z, torch.full((len(z),), sigma, device=z.device)).to(z.dtype)


def _half_log_snr(sigma: float) -> float:
    """lambda = ln((1 - sigma) / sigma), for sigma > 0."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
