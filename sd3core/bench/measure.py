"""Measures on a machine that is never quiet: programs in turn, medians of ratios.

All are measured within one process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

from sd3core.machine import seconds_of

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"} | {
    f"aten::_scaled_dot_product_flash_attention_for_cpu{way}" for way in ("", "_backward")
}


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, each round once through all of them, so that a slow minute of the
    machine slows all alike. The order is turned by one each round. The first round warms up and is not counted.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            spent = seconds_of(contenders[name], device)
            if number > 0:
                seconds[name].append(spent)
        if on_round is not None:
            on_round(number)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: what one round's neighbours share, cancels."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def product_seconds(work: Callable[[], object]) -> float:
    """What a CPU spends in the matrix products of `work` and in fused attention: the part that no fusing of the rest
    makes shorter. The profiler's own time is not in it.
    """
    with _profiled() as recorded:
        work()
    return sum(row.self_cpu_time_total for row in recorded.key_averages() if row.key in PRODUCTS) / 1e6


def peak_bytes_above_start(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` held at once, above what was held when it began.

    CUDA: the allocator's own count. CPU: allocations and frees as the profiler saw them, in order.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profiled(profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _profiled(**options: bool) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells its phases on stderr
    return profile(activities=[ProfilerActivity.CPU], **options)
