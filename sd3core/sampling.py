"""From noise to a latent: sigma schedules, guidance, Euler's method on dz/dt = velocity; sigma is t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sd3core.errors import UserError
from sd3core.rectified_flow import resolution_shift

Predict = Callable[[Tensor, Tensor], Tensor]  # (z_t (B, ...), t (B,)) -> velocity (B, ...)


def sigma_schedule(
    num_steps: int, *, shift: float, convention: Literal["reference", "textbook"] = "reference"
) -> Tensor:
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


def sample_euler(
    predict: Predict, noise: Tensor, sigmas: Tensor, *, on_step: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """z <- z + (sigma_{i+1} - sigma_i) * velocity(z, sigma_i), exact where the velocity is constant.

    noise (B, ...), at the level of sigmas[0]; sigmas (N + 1,) descending. The state is kept in float32 at least and
    comes back in noise's dtype. on_step(i, z) is called after step i = 0 .. N - 1. Gradients are the caller's business.
    """
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    levels = sigmas.tolist()
    for i, (sigma, next_sigma) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        t = torch.full((len(z),), sigma, device=z.device)
        z = z + (next_sigma - sigma) * predict(z, t).to(z.dtype)
        if on_step is not None:
            on_step(i, z)
    return z.to(noise.dtype)
