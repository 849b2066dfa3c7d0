"""Measures a machine's rate of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATMUL_SIDES = {"cpu": 1024, "cuda": 8192}  # the rate grows no more beyond


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on a GPU; a CPU has nothing queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, including what it queued."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """The best FLOP/s of a few products of two square matrices, after one that warms up."""
    side = MATMUL_SIDES["cpu" if device.type == "cpu" else "cuda"]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(6)]
    return 2 * side**3 / min(seconds[1:])
