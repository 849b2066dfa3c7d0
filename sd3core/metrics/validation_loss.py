"""Validation loss: the velocity error at fixed noise levels, held-out samples.

Paper 5.3.3 and App. B.3.

It compares formulations, whose own losses have different units: each network is asked at the same log-SNRs, and what it
predicts is turned into the velocity noise - x0 of rectified flow (Formulation.as_rectified_flow).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sd3core.metrics.score import LEVELS, LeftOut, Score, too_few
from sd3core.randomness import normal
from sd3core.rectified_flow import interpolate, velocity_target

MIN_SAMPLES = 8


def level_losses(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, sample_ids: np.ndarray, seed: int) -> Tensor:
    """mean over C, h, w of (velocity(z_t, t) - (noise - x0))^2 at every level. x0 (B, C, h, w) -> (B, len(LEVELS))
    float64, CPU.

    The noise is a function of (seed, level, sample), so every checkpoint is measured on the same points.
    """
    losses = []
    for position, level in enumerate(LEVELS):
        noise = torch.from_numpy(normal(seed, position, sample_ids, "validation_noise", tuple(x0.shape[1:]))).to(x0)
        t = torch.full((len(x0),), level, device=x0.device)
        error = velocity(interpolate(x0, noise, t), t).float() - velocity_target(x0, noise)
        losses.append(error.square().flatten(1).double().mean(dim=1).cpu())
    return torch.stack(losses, dim=1)


def image_losses(losses: Tensor) -> Tensor:
    """Mean over all levels but the last: (n, len(LEVELS)) -> (n,) float64. Their mean is the validation loss."""
    return losses.double()[:, :-1].mean(dim=1)


def validation_loss(losses: Tensor) -> Score | LeftOut:
    """Mean over samples and over all levels but the last. losses (n, len(LEVELS))."""
    if len(losses) < MIN_SAMPLES:
        return too_few("validation loss", len(losses), MIN_SAMPLES, "held-out images")
    return Score(float(losses.double()[:, :-1].mean()), len(losses))
