"""Measures a machine's rate of matrix products, and keeps freed memory.

By default glibc gives freed blocks back to the system: a training step allocates the same large ones again and again, and
faulting them in costs a fifth of it. Other C libraries know nothing of these settings and lose nothing by them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

_MALLOC = {  # the environment's name -> (mallopt's number, value)
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 1024**2),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 64 * 1024**2),
}
# For a process that is yet to start, and whose work runs in other threads than its first.
ALLOCATOR_ENVIRONMENT = {name: str(value) for name, (_, value) in _MALLOC.items()}

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


def keep_freed_memory() -> None:
    """Has this process keep what it frees, from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for number, value in _MALLOC.values():
            mallopt(number, value)
