"""Has a process keep the memory that it frees.

By default glibc gives freed blocks back to the system: a training step allocates the same large ones again and again, and
faulting them in costs a fifth of it. Other C libraries know nothing of these settings and lose nothing by them.
"""

from __future__ import annotations

import ctypes

_MALLOC = {  # the environment's name -> (mallopt's number, value)
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 1024**2),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 64 * 1024**2),
}
# For a process that is yet to start, and whose work runs in other threads than its first.
ALLOCATOR_ENVIRONMENT = {name: str(value) for name, (_, value) in _MALLOC.items()}


def keep_freed_memory() -> None:
    """Has this process keep what it frees, from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for number, value in _MALLOC.values():
            mallopt(number, value)
