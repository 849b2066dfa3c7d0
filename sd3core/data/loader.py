"""From the training plan to batches: each rank's slice of every step, made ahead.

The held-out part is read here too.

What a rank reads is what it trains on: the rows of its slots, each with the one caption that is drawn for it. Where
there is room, the rest of a row's piece, which its slot takes in later batches, comes by the same request and waits.

A step is made in parts, as the trainer takes it: a rank never holds a whole one. What it holds has a bound:

    rows that wait for later steps    read_ahead_bytes / 2
    parts that are ready              read_ahead_bytes / 2, or FEWEST_AHEAD parts where these are more
    rows that a part is made of       a part for each of `threads`
    requests under way                READ_THREADS of at most SPAN_BYTES_AT_MOST (sd3core.data.shard_cache): 0.13 GB

With sd3-8b's 1.5 GB, its 983,040 bytes of a caption and 16-bit latents that is 1.70 GB where a part has 32 rows of 256 px
(33 MB) and 1.64 GB where it has 2 of 1,024 px (3 MB), whatever the number of ranks. The trainer holds a few parts more, 0.1 GB.
`tests/sd3core/data/test_reading_at_scale.py` counts and measures it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from sd3core.data.batch_bytes import PackedBatch, StoredSample
from sd3core.data.encoded_shards import Split
from sd3core.data.shard_reader import CaptionDraws, ShardReader
from sd3core.data.training_plan import PlannedBatch, TrainingPlan
from sd3core.errors import DataError
from sd3core.randomness import uniform, uniforms

if TYPE_CHECKING:
    from sd3core.data.batch import Batch

READ_AHEAD_BYTES = 2e9  # of parts that are ready, and of rows that wait for theirs: half of it each
FEWEST_AHEAD, MOST_AHEAD = 2, 16  # parts; of a step that has many, as many steps as FEWEST_AHEAD says
FLIPPED_SHARE = 0.5  # of the epochs of an image that may be flipped
MOST_BUFFERS = 256  # that are ready: each may be an open file

Claim = tuple["_Fetched", int]
PlannedRow = tuple[str, int, int, int]  # bucket, epoch, position of the shard, row counted within shard and bucket


class _Fetched:
    """Rows that one job fetches. A row is let go of when it is taken."""

    def __init__(self, job: Future[list[StoredSample | None]]) -> None:
        self.job = job

    def take(self, place: int) -> StoredSample:
        samples = self.job.result()
        sample, samples[place] = samples[place], None
        assert sample is not None, "a row is taken once"
        return sample

    @property
    def failed(self) -> bool:
        return self.job.cancelled() or (self.job.done() and self.job.exception() is not None)


class BatchLoader:
    """`batch(step, part)`: a part of this rank's consecutive slice of the global batch that the plan has for the step.

    Steps and parts count from 0. Those that come after it are read and made by threads meanwhile, so many as
    `read_ahead_bytes` holds, so that training does not wait. Any step may be asked for next.
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
        micro_batch: int | None = None,
        steps: int | None = None,
        read_ahead_bytes: float = READ_AHEAD_BYTES,
        ahead: int | None = None,
        threads: int = 2,
    ) -> None:
        """`micro_batch`: rows of a part; None makes one part of a rank's whole slice. `steps`: how many there will be, so that
        nothing is read for later ones. `ahead`: parts, instead of as many as there is room for.
        """
        share = plan.global_batch // world
        self.part_rows = micro_batch or share
        if plan.global_batch % (world * self.part_rows):
            raise DataError(
                f"global_batch {plan.global_batch} is not a multiple of {world} ranks"
                + (f" x micro_batch {micro_batch}" if micro_batch else "")
                + "; change compute.train_ranks"
            )
        self.parts = share // self.part_rows
        self.reader, self.plan, self.original_fraction, self.seed = reader, plan, original_fraction, seed
        self.steps, self.read_ahead_bytes, self._ahead = steps, read_ahead_bytes, ahead
        self._first_slot = rank * share
        self._making = ThreadPoolExecutor(threads, thread_name_prefix="batches")
        self._fetching = ThreadPoolExecutor(threads, thread_name_prefix="rows")
        self._made: dict[int, Future[PackedBatch]] = {}  # by number: step * parts + part
        self._waiting: dict[PlannedRow, Claim] = {}  # rows that are here, or on their way, for later batches
        self._next = 0
        self._part_bytes = 0

    @property
    def ahead(self) -> int:
        """Parts that are made before they are asked for: of those that have been made the size is known."""
        if self._ahead is not None:
            return self._ahead
        room = self.read_ahead_bytes / 2 / self._part_bytes if self._part_bytes else FEWEST_AHEAD
        most = min(max(MOST_AHEAD, FEWEST_AHEAD * self.parts), MOST_BUFFERS)
        return max(FEWEST_AHEAD, min(most, int(room)))

    def batch(self, step: int, part: int = 0) -> Batch:
        """Original or synthetic caption, and which of several: by (seed, epoch, sample), so neither ranks nor restarts change it."""
        return _unpacked(self.packed(step, part))

    def packed(self, step: int, part: int = 0) -> PackedBatch:
        """As `batch`, as bytes."""
        number = step * self.parts + part
        was_ahead = number in self._made
        if number != self._next:  # rows that wait are for steps that follow each other
            self._forget()
        self._next = number + 1
        for coming in range(number, number + 1 + self.ahead):
            if coming not in self._made and (coming == number or self._will_come(coming)):
                self._made[coming] = self._submit(coming)
        try:
            packed = self._made.pop(number).result()
        except Exception:
            self._forget()
            if not was_ahead:
                raise
            # what failed ahead, perhaps long ago, is tried once more when needed
            packed = self._submit(number).result()
        self._part_bytes = max(self._part_bytes, _bytes_of(packed))
        return packed

    def samples(self, wanted: Iterable[tuple[int, str]]) -> list[Batch]:
        """The samples with these (shard number, key), in batches of one bucket; those that do not stand are left out."""
        return [_unpacked(packed) for packed in self.packed_samples(wanted)]

    def packed_samples(self, wanted: Iterable[tuple[int, str]]) -> list[PackedBatch]:
        """As `samples`, as bytes."""
        places: dict[str, list[tuple[int, int]]] = {}
        for position, row, bucket in self.reader.find(wanted):
            places.setdefault(bucket, []).append((position, row))
        batches = []
        for bucket, pairs in places.items():
            shards, rows = np.array(pairs, dtype=np.int64).T
            batches.append(self.reader.originals(shards, rows, bucket))
        return batches

    def close(self) -> None:
        """Stops making batches ahead."""
        for threads in (self._making, self._fetching):
            threads.shutdown(wait=True, cancel_futures=True)

    def _will_come(self, number: int) -> bool:
        return self.steps is None or number < self.steps * self.parts

    def _forget(self) -> None:
        """Lets go of all that was read ahead."""
        for future in self._made.values():
            future.cancel()
        self._made, self._waiting = {}, {}

    def _submit(self, number: int) -> Future[PackedBatch]:
        """Begins to make a part. They are submitted in order, so that each takes the rows that earlier ones left for it."""
        step, part = divmod(number, self.parts)
        slots = self.slots_of(part)
        planned = self.plan.batch(step, slots)
        return self._making.submit(self._make, planned, self._claim(step, slots, planned))

    def slots_of(self, part: int) -> slice:
        """Of the global batch."""
        begin = self._first_slot + part * self.part_rows
        return slice(begin, begin + self.part_rows)

    def _claim(self, step: int, slots: slice, planned: PlannedBatch) -> list[Claim]:
        """Where each row of the part will come from; what is not on its way is sent for."""
        rows = _rows_of(planned)
        lacking = [place for place, row in enumerate(rows) if row not in self._waiting or self._waiting[row][0].failed]
        if lacking:
            mine = np.arange(slots.start, slots.stop)[lacking]
            self._fetch([rows[place] for place in lacking], self.plan.piece(step, mine, self.steps))
        return [self._waiting.pop(row) for row in rows]

    def _fetch(self, rows: list[PlannedRow], rest: PlannedBatch) -> None:
        """Sends for rows, and for as much of what lies behind them as there is room for."""
        room = int(self.read_ahead_bytes / 2 / self.reader.row_bytes) - len(self._waiting)
        behind = [row for row in _rows_of(rest)[: max(0, room)] if row not in self._waiting]
        wanted = rows + behind
        fetched = _Fetched(self._fetching.submit(self._read, wanted))
        self._waiting |= {row: (fetched, place) for place, row in enumerate(wanted)}

    def _read(self, wanted: Sequence[PlannedRow]) -> list[StoredSample | None]:
        """Rows of one bucket, each with the caption that is drawn for it."""
        epochs, shards, units = np.array([row[1:] for row in wanted], dtype=np.int64).T

        def draw(ids: np.ndarray) -> CaptionDraws:
            kind, which = uniforms(self.seed, epochs, ids, "caption", 2).T
            return CaptionDraws(kind >= self.original_fraction, which)

        return list(self.reader.read_units(shards, units, wanted[0][0], draw))

    def _make(self, planned: PlannedBatch, claims: list[Claim]) -> PackedBatch:
        samples = [fetched.take(place) for fetched, place in claims]
        flipped = None
        if self.reader.has_flips:
            ids = [sample.sample_id for sample in samples]
            flipped = uniform(self.seed, planned.epoch, ids, "flip") < FLIPPED_SHARE
        return self.reader.packed(samples, planned.epoch, planned.bucket, flipped)


def load_split(reader: ShardReader, split: Split, batch: int, limit: int | None = None) -> Iterator[Batch]:
    """At most `limit` rows of a split, each with its first original caption, in batches of one bucket, for evaluation.

    Shards, then rows, are taken in the order of a hash: the choice does not follow the order of the data, is the same
    at every resolution, and of a large data set only as many shards are opened as are needed.
    """
    chosen = _spread(reader, split, limit)
    for bucket in sorted({bucket for _, _, bucket in chosen}):
        places = np.array([(position, row) for position, row, name in chosen if name == bucket], dtype=np.int64)
        for start in range(0, len(places), batch):
            yield _unpacked(reader.originals(*places[start : start + batch].T, bucket))


def _spread(reader: ShardReader, split: Split, limit: int | None) -> list[tuple[int, int, str]]:
    """(position of the shard, row, bucket): whole shards in the order of their numbers' hashes until there are enough,
    of those the first by sample id; a shard's rows stay together.
    """
    taken: list[tuple[int, int, int, str]] = []
    counts = reader.all_rows(split).rows.sum(axis=1)
    for position in sorted(np.flatnonzero(counts).tolist(), key=lambda p: _hash(reader.shards[p].latents.number)):
        if limit is not None and len(taken) >= limit:
            break
        rows = reader.rows(position)
        for bucket in rows.buckets:
            for row in rows.of(bucket, split).tolist():
                taken.append((int(rows.sample_ids[row]), position, row, bucket))
    first = sorted(taken)[:limit]
    return sorted((position, row, bucket) for _, position, row, bucket in first)


def _rows_of(planned: PlannedBatch) -> list[PlannedRow]:
    places = zip(planned.epoch.tolist(), planned.shard.tolist(), planned.row.tolist(), strict=True)
    return [(planned.bucket, *place) for place in places]


def _bytes_of(packed: PackedBatch) -> int:
    return packed.layout.size


def _unpacked(packed: PackedBatch) -> Batch:
    from sd3core.data.batch import unpacked  # here: a process that only reads loads no torch

    return unpacked(packed.layout, packed.buffer.memory)


def _hash(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()
