"""From the training plan to batches: each rank's slice of every step, made ahead.

The held-out part is read here too.

A batch is gathered from decoded shards by row numbers; nothing is parsed in the training loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sd3core.data.encoded_shards import Split
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import Batch, ShardReader
from sd3core.data.shards import sample_id
from sd3core.data.training_plan import PlanTable, TrainingPlan
from sd3core.errors import DataError
from sd3core.randomness import uniform

__all__ = ["Batch", "BatchLoader", "ShardCache", "ShardReader", "load_split"]

BATCHES_AHEAD = 4
SHARDS_AHEAD = 16  # steps: shards are asked for so much earlier than their batch is made


class BatchLoader:
    """`batch(step)`: this rank's consecutive slice of the global batch that the plan has for the step (from 0 on).

    The steps after it are made by threads meanwhile, and shards that come later are fetched, so that training does not
    wait. Any step may be asked for next.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: TrainingPlan,
        *,
        original_fraction: float,
        seed: int,
        rank: int,
        world: int,
        ahead: int = BATCHES_AHEAD,
        threads: int = 2,
    ) -> None:
        if plan.global_batch % world:
            raise DataError(
                f"global_batch {plan.global_batch} is not a multiple of {world} ranks; change compute.train_ranks"
            )
        self.reader, self.plan, self.original_fraction, self.seed, self.ahead = (
            reader,
            plan,
            original_fraction,
            seed,
            ahead,
        )
        share = plan.global_batch // world
        self._slice = slice(rank * share, (rank + 1) * share)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="batches")
        self._warming = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._made: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Original or synthetic caption: by (seed, epoch, sample), so neither ranks nor restarts change it."""
        wanted, was_ahead = range(step, step + 1 + self.ahead), step in self._made
        self._drop(self._made.keys() - set(wanted))
        for coming in wanted:
            if coming not in self._made:
                self._made[coming] = self._threads.submit(self._make, coming)
        if self.ahead:
            self._warming.submit(self._fetch_shards, step + SHARDS_AHEAD)
        try:
            return self._made.pop(step).result()
        except Exception:
            self._drop(list(self._made))
            if not was_ahead:
                raise
            return self._make(step)  # what failed ahead, perhaps long ago, is tried once more now that it is needed

    def samples(self, wanted: Iterable[tuple[int, str]]) -> list[Batch]:
        """The samples with these (shard number, key), in batches of one bucket; those that do not stand are left out."""
        places: dict[str, list[tuple[int, int]]] = {}
        for number, key in wanted:
            if found := self.reader.find(number, key):
                position, row, bucket = found
                places.setdefault(bucket, []).append((position, row))
        batches = []
        for bucket, pairs in places.items():
            shards, rows = np.array(pairs, dtype=np.int64).T
            batches.append(_originals(self.reader, shards, rows, bucket))
        return batches

    def close(self) -> None:
        """Stops making batches ahead."""
        for threads in (self._threads, self._warming):
            threads.shutdown(wait=True, cancel_futures=True)

    def _drop(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._made.pop(step).cancel()

    def _make(self, step: int) -> Batch:
        planned, mine = self.plan.batch(step), self._slice
        shards, rows, epochs = planned.shard[mine], planned.row[mine], planned.epoch[mine]
        ids = np.array([sample_id(key) for key in self.reader.keys_of(shards, rows)], dtype=np.int64)
        synthetic = uniform(self.seed, epochs, ids, "caption") >= self.original_fraction
        return self.reader.gather(shards, rows, synthetic, epochs, planned.bucket)

    def _fetch_shards(self, step: int) -> None:
        """A failure here is told by the step that needs the shard."""
        for position in np.unique(self.plan.batch(step).shard[self._slice]).tolist():
            self.reader.decoded(position)


def load_split(reader: ShardReader, split: Split, batch: int, limit: int | None = None) -> Iterator[Batch]:
    """At most `limit` rows of a split, original captions first choice, in batches of one bucket, for evaluation.

    Shards, then rows, are taken in the order of a hash: the choice does not follow the order of the data, is the same
    at every resolution, and of a large data set only as many shards are read as are needed.
    """
    table, _ = reader.table(split)
    chosen = _spread(reader, table, len(table) if limit is None else limit)
    for code, bucket in enumerate(table.buckets):
        rows = chosen[table.bucket[chosen] == code]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            yield _originals(reader, table.shard[part], table.row[part], bucket)


def _originals(reader: ShardReader, shards: np.ndarray, rows: np.ndarray, bucket: str) -> Batch:
    """Rows with their original captions first choice, outside any epoch."""
    synthetic, epochs = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=np.int64)
    return reader.gather(shards, rows, synthetic, epochs, bucket)


def _spread(reader: ShardReader, table: PlanTable, limit: int) -> np.ndarray:
    """Rows of the table: whole shards in the order of their numbers' hashes until there are enough, of those the first
    by sample id.
    """
    taken: list[int] = []
    for position in sorted(np.unique(table.shard).tolist(), key=lambda p: _hash(reader.shards[p].latents.number)):
        if len(taken) >= limit:
            break
        taken += np.flatnonzero(table.shard == position).tolist()
    keys = reader.keys_of(table.shard[taken], table.row[taken])
    first = sorted(range(len(taken)), key=lambda place: sample_id(keys[place]))[:limit]
    return np.sort(np.array([taken[place] for place in first], dtype=np.int64))  # a shard's rows together


def _hash(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()
