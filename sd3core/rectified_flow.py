"""Rectified flow: straight paths from data (t = 0) to noise (t = 1). Paper 2, 3 and, for the shift, 5.3.2."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

TensorOrFloat = TypeVar("TensorOrFloat", Tensor, float)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) as (B, 1, ..., 1), to be multiplied with `like` (B, ...)."""
    return t.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x0 + t noise. x0, noise (B, ...); t (B,) -> (B, ...)."""
    t = per_sample(t, x0).to(x0.dtype)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dz_t/dt = noise - x0."""
    return noise - x0


def resolution_shift(t: TensorOrFloat, alpha: float) -> TensorOrFloat:
    """t' = alpha t / (1 + (alpha - 1) t): the log-SNR falls by 2 ln(alpha). Paper 5.3.2."""
    return alpha * t / (1 + (alpha - 1) * t)
