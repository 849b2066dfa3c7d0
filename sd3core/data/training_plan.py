"""The training plan: which samples make up batch number `step`. A pure function of (rows, seed, global batch).

Every bucket is an endless stream: its rows in the order of epoch 0, then of epoch 1, and so on, and its batches are
consecutive pieces of that stream. So each row comes exactly once in each epoch, none is dropped, and a batch that an
epoch does not fill is completed by the first rows of the next. Each sample carries the epoch it is drawn for, so (seed,
epoch, sample) never comes twice, also where a bucket has fewer rows than a batch. Batches of the buckets are
interleaved in proportion to their rows. Any step is reached without going through the steps before it, at any world
size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sd3core.errors import DataError

WINDOW_SHARDS = 8
NO_ROWS = (
    "there is no row to train on: every row is held out or has no caption; add data or lower data.held_out_fraction"
)


@dataclass(frozen=True, eq=False)
class PlanTable:
    """The rows to train on. `shard` and `row` say where a row stands, `bucket` is an index into `buckets`."""

    shard: np.ndarray  # (N,) position of the shard in the manifest
    row: np.ndarray  # (N,) row of the shard's index
    bucket: np.ndarray  # (N,)
    buckets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """The global batch of one step: one bucket, the same on all ranks."""

    bucket: str
    shard: np.ndarray  # (G,)
    row: np.ndarray  # (G,)
    epoch: np.ndarray  # (G,)


@dataclass(frozen=True)
class BucketReport:
    """One bucket's epoch: `batches` cover its rows, and the last of them takes `repeated` rows of the next epoch.

    They come once more in the run than a whole number of epochs says, but not once more in the next epoch.
    """

    rows: int
    batches: int
    repeated: int


class TrainingPlan:
    """`batch(step)` for any step from 0 on.

    Rows are drawn from a moving window: an epoch visits the shards in an order of its own, and a row of the p-th of
    them comes between the places p and p + window_shards. So a rank needs about that many shards at a time.
    """

    def __init__(self, table: PlanTable, seed: int, global_batch: int, window_shards: int = WINDOW_SHARDS) -> None:
        if len(table) == 0:
            raise DataError(NO_ROWS)
        self.table, self.seed, self.global_batch, self.window_shards = table, seed, global_batch, window_shards
        self._shards = int(table.shard.max()) + 1
        self._rows = [np.flatnonzero(table.bucket == code) for code in range(len(table.buckets))]
        self._codes = [code for code, rows in enumerate(self._rows) if len(rows)]
        self._shares = np.array([len(self._rows[code]) / len(table) for code in self._codes])
        self._phases = _generator(seed, "interleaving").random(len(self._codes))
        self._order = lru_cache(maxsize=4 * len(self._codes))(self._make_order)

    def batch(self, step: int) -> PlannedBatch:
        code, number = self.bucket_of(step)
        size = len(self._rows[code])
        places = np.arange(number * self.global_batch, (number + 1) * self.global_batch)  # in the bucket's stream
        epochs = places // size
        chosen = [self._order(code, epoch)[places[epochs == epoch] % size] for epoch in np.unique(epochs).tolist()]
        rows = np.concatenate(chosen)
        return PlannedBatch(self.table.buckets[code], self.table.shard[rows], self.table.row[rows], epochs)

    def bucket_of(self, step: int) -> tuple[int, int]:
        """Which bucket the step takes, and how many batches that bucket has given before.

        Batch j of a bucket with share p falls due at time (j + phase) / p; the steps are all due times in order. By
        time T between T - B and T + B of them have passed (B buckets), so only that neighbourhood of `step` is looked
        at.
        """
        reach = len(self._codes) + 1
        start = max(0.0, step - reach)
        # due before `start`, by bucket
        passed = np.maximum(0, np.ceil(start * self._shares - self._phases)).astype(np.int64)
        due = [
            ((number + phase) / share, position, number)
            for position, (share, phase) in enumerate(zip(self._shares, self._phases, strict=True))
            for number in range(passed[position], passed[position] + math.ceil((2 * reach + 1) * share) + 2)
        ]
        _, position, number = sorted(due)[step - int(passed.sum())]
        return self._codes[position], int(number)

    def epoch_report(self) -> dict[str, BucketReport]:
        """What an epoch is, by bucket."""
        sizes = {self.table.buckets[code]: len(self._rows[code]) for code in self._codes}
        return {
            bucket: BucketReport(rows, math.ceil(rows / self.global_batch), -rows % self.global_batch)
            for bucket, rows in sizes.items()
        }

    def _make_order(self, code: int, epoch: int) -> np.ndarray:
        """The bucket's rows (positions in the table) in the order of one epoch."""
        rows = self._rows[code]
        # the same for all buckets: they share the cache
        visited = _generator(self.seed, "shards", epoch).permutation(self._shards)
        jitter = _generator(self.seed, "rows", epoch, code).random(len(rows)) * min(self.window_shards, self._shards)
        return rows[np.argsort(visited[self.table.shard[rows]] + jitter, kind="stable")]


def _generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Philox keyed by all of the arguments; a negative seed is another one than its positive."""
    entropy = hashlib.sha256(f"{int(seed)}/{purpose}/{'/'.join(map(str, numbers))}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(entropy[:16], dtype="<u8")))
