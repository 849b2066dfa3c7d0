"""Measures a training step: loss by timestep, where its time went, FLOPs and MFU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sd3core.machine import matmul_flops_per_second
from sd3core.mmdit import BackboneConfig
from sd3core.mmdit.flops import forward_flops
from sd3core.recipe import Training

TIMESTEP_BINS = 8  # equal parts of [0, 1], in rectified flow's t at the same log-SNR

# Dense bf16 FLOP/s as the vendor declares them, by a part of the device's name; other devices are measured.
DECLARED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}


def learning_rate(training: Training, samples_seen: int) -> float:
    """Linear warm-up, then constant, or a cosine that ends at a tenth. `samples_seen`: before the step."""
    warmup = training.warmup_samples
    if samples_seen < warmup:
        return training.learning_rate * (samples_seen + training.global_batch) / (warmup + training.global_batch)
    if training.schedule == "constant":
        return training.learning_rate
    progress = min(1.0, (samples_seen - warmup) / max(1, training.samples - warmup))
    return training.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


class StepLoss:
    """Sums of a step's losses, in all and by timestep bin; `totals` of all ranks add up to the global batch's."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(2, TIMESTEP_BINS, dtype=torch.float64, device=device)  # sums, counts

    def add(self, losses: Tensor, t: Tensor) -> None:
        """losses (B,), t (B,) in [0, 1]."""
        bins = (t * TIMESTEP_BINS).long().clamp(0, TIMESTEP_BINS - 1)
        self.totals[0].index_add_(0, bins, losses.detach().double())
        self.totals[1].index_add_(0, bins, torch.ones_like(t, dtype=torch.float64))

    def row(self) -> dict[str, float | list[float | None]]:
        sums, counts = self.totals.tolist()
        by_bin = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        return {"loss": sum(sums) / sum(counts), "loss_by_t": by_bin}


class StepClock:
    """Wall time. A step lasts from the end of the one before to its own end, with all that was done between them."""

    PARTS = ("wait_s", "checkpoint_s")  # for inputs; for a checkpoint that was written before the step

    def __init__(self) -> None:
        self._began, self._spent = time.perf_counter(), dict.fromkeys(self.PARTS, 0.0)

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - begin

    def end_step(self, device: torch.device) -> tuple[float, dict[str, float]]:
        """(seconds that the step took, those of its parts on the rank that spent most). All ranks call it."""
        spent = torch.tensor([self._spent[part] for part in self.PARTS], dtype=torch.float64, device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        ended, began = time.perf_counter(), self._began
        self._began, self._spent = ended, dict.fromkeys(self.PARTS, 0.0)
        return ended - began, dict(zip(self.PARTS, spent.tolist(), strict=True))


def flops_per_sample(config: BackboneConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of one training sample: forward, and backward, which is twice the forward."""
    return 3 * forward_flops(config, image_tokens, text_tokens)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of one rank, "declared" or "measured"): the vendor's figure, else that of matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in DECLARED_PEAKS.items():
            if part in name and dtype == torch.bfloat16:
                return peak, "declared"
    return matmul_flops_per_second(dtype, device), "measured"
