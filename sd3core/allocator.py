"""glibc's allocator told to keep freed memory: a training step frees and allocates the same large blocks again and again.

By default it gives them back to the system, and faulting them in again costs a fifth of a step. Other C libraries know
nothing of these settings and lose nothing by them.
"""

from __future__ import annotations

import ctypes

_SETTINGS = {  # the environment's name -> (mallopt's number, value)
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 1024**2),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 64 * 1024**2),
}

# For a process that is yet to start, and whose work runs in other threads than its first.
ENVIRONMENT = {name: str(value) for name, (_, value) in _SETTINGS.items()}


def keep_freed_memory() -> None:
    """The same for this process, from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for number, value in _SETTINGS.values():
            mallopt(number, value)
