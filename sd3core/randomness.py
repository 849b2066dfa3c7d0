"""Counter-based random draws: functions of (seed, epoch, sample, purpose).

So neither the number of ranks, nor a restart, nor the order of samples changes any of them. Philox4x64-10 (Salmon et
al. 2011, as in numpy) with the key made from (seed, purpose) and the counter from (epoch, sample id). Held by golden
values in the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

SampleIds = np.ndarray | Sequence[int]
Epochs = int | np.ndarray | Sequence[int]  # one for all samples, or one a sample


def uniform(seed: int, epoch: Epochs, sample_ids: SampleIds, purpose: str) -> np.ndarray:
    """One number a sample. sample_ids (B,) of non-negative int64 -> (B,) float64 in [0, 1)."""
    return uniforms(seed, epoch, sample_ids, purpose, 1)[:, 0]


def uniforms(seed: int, epoch: Epochs, sample_ids: SampleIds, purpose: str, count: int) -> np.ndarray:
    """`count` numbers a sample; the first is that of `uniform`. -> (B, count) float64 in [0, 1)."""
    draws = np.empty((len(sample_ids), count))
    for row, generator in zip(draws, _generators(seed, epoch, sample_ids, purpose), strict=True):
        generator.random(out=row)
    return draws


def normal(seed: int, epoch: Epochs, sample_ids: SampleIds, purpose: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise. -> (B, *shape) float32."""
    draws = np.empty((len(sample_ids), int(np.prod(shape))), dtype=np.float32)
    for row, generator in zip(draws, _generators(seed, epoch, sample_ids, purpose), strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return draws.reshape(len(sample_ids), *shape)


def _generators(seed: int, epoch: Epochs, sample_ids: SampleIds, purpose: str) -> Iterator[np.random.Generator]:
    """One generator a sample: always the same object, set to the sample's counter: a new one costs more."""
    digest = hashlib.sha256(f"{int(seed)}/{purpose}".encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    generator = np.random.Generator(philox)
    state = philox.state
    counter = np.zeros(4, dtype=np.uint64)  # word 0 counts the blocks of one sample's draws
    state["state"]["counter"] = counter
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), (len(sample_ids),))
    for counter[2], counter[3] in zip(epochs, np.asarray(sample_ids, dtype=np.uint64), strict=True):
        philox.state = state
        yield generator
