"""Exponential moving average of weights, updated every so many steps (paper appendix B.3: 0.99 every 100 steps)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def decay_per_step(decay: float, every_steps: int) -> float:
    """The decay of an average updated at every step that forgets as fast: decay^(1/every). 0.99 every 100 -> 0.9999."""
    return decay ** (1 / every_steps)


def warmed_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)) for update n = 0, 1, ...: a young average lets go of the initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def update_ema(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * weight, in place, in the averages' dtype.

    That is to be float32: bf16 would lose the update.
    """
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight.to(average.dtype), 1 - decay)
