"""Counts a data set's images by bucket, before any of them is encoded.

Ingest wrote their sizes into the raw shards' indexes. A shard is counted once for each rule of sizes, and a record beside the
raw shards keeps the counts: where it stands no index is read. What a rule leaves out is in no bucket, and is counted apart.
"""

from __future__ import annotations

import base64
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd3core.buckets import Side, bucket_name, cut_off, merged_buckets
from sd3core.data.kept_rows import ALL_ROWS, KeptRows
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.records import own_digest, sealed
from sd3core.data.shards import parts_digest, read_shard_index
from sd3core.data.size_rule import Sides, SizeRule, image_sizes
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.data.uncaptioned import SPLITS
from sd3core.data.unit_counts import UnitCounts
from sd3core.errors import DataError
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.specs import fingerprint
from sd3core.words import counted, some

COUNTED = "BUCKETS."  # begins the name of the record, beside the raw shards
COUNTING_THREADS = 16
SHARDS_A_RECORD = 10_000  # are counted before the records are written: so many a kill may cost
SHARDS_SHOWN = 256  # are counted between two words on the progress


@dataclass(frozen=True, eq=False)
class RawBuckets:
    """How many images of each raw shard are nearest to each bucket and large enough for it, and how many are not."""

    sides: Sides
    numbers: tuple[int, ...]  # of the shards
    rows: np.ndarray  # (shards, sides, 2) int32: to train on, held out
    too_small: np.ndarray  # (shards, 2) likewise

    def to_train_on(self) -> dict[Side, int]:
        """Of all shards; buckets without any are left out."""
        totals = self.rows[:, :, SPLITS.index("train")].sum(axis=0, dtype=np.int64).tolist()
        return {side: total for side, total in zip(self.sides, totals, strict=True) if total}

    def shards_with(self, side: Side) -> set[int]:
        """The numbers of the shards that have images of a bucket."""
        there = self.rows[:, self.sides.index(side)].any(axis=1)
        return {number for number, found in zip(self.numbers, there.tolist(), strict=True) if found}

    def left_out(self) -> dict[int, int]:
        """The images that are too small, by the number of their shard, where there are any."""
        totals = self.too_small.sum(axis=1).tolist()
        return {number: total for number, total in zip(self.numbers, totals, strict=True) if total}


def count_raw_buckets(
    store: Store,
    raw: Manifest,
    rules: Sequence[SizeRule],
    report: ProgressCallback = ignore_progress,
    kept: KeptRows = ALL_ROWS,
) -> list[RawBuckets]:
    """The images that are kept by each rule of sizes. An index is read once for all rules, where a record of one lacks its shard.

    One process calls it: it writes the records. DataError where an index is gone or damaged.
    """
    known = _read_records(store, raw, rules)
    new = _uncounted(raw, kept, known)
    meter = ProgressMeter(len(raw.shards), "shards", report, already_done=len(raw.shards) - len(new))
    with ThreadPoolExecutor(COUNTING_THREADS, thread_name_prefix="sizes") as threads:
        for part in _parts(new, SHARDS_A_RECORD):
            for few in _parts(part, SHARDS_SHOWN):
                _count(store, raw, kept, few, known, threads)
                meter.advance(len(few), "images counted by size")
            _write_records(store, raw, kept, known)
    return [_counts_of(raw, kept, rule, known[rule]) for rule in rules]


def look_at_raw_buckets(
    store: Store, raw: Manifest, rules: Sequence[SizeRule], at_most: int, kept: KeptRows = ALL_ROWS
) -> list[RawBuckets] | None:
    """As count_raw_buckets, and writes nothing; None where that would read more than `at_most` indexes."""
    known = _read_records(store, raw, rules)
    new = _uncounted(raw, kept, known)
    if len(new) > at_most:
        return None
    with ThreadPoolExecutor(COUNTING_THREADS, thread_name_prefix="sizes") as threads:
        _count(store, raw, kept, new, known, threads)
    return [_counts_of(raw, kept, rule, known[rule]) for rule in rules]


def _parts(shards: Sequence[ShardEntry], size: int) -> list[Sequence[ShardEntry]]:
    return [shards[start : start + size] for start in range(0, len(shards), size)]


# rule -> _content of a shard -> (sides + 1, 2) int32, the last of what is too small
_Known = dict[SizeRule, dict[str, np.ndarray]]


def _uncounted(raw: Manifest, kept: KeptRows, known: _Known) -> list[ShardEntry]:
    return [shard for shard in raw.shards if any(_content(shard, kept) not in counts for counts in known.values())]


def _count(
    store: Store,
    raw: Manifest,
    kept: KeptRows,
    shards: Sequence[ShardEntry],
    known: _Known,
    threads: ThreadPoolExecutor,
) -> None:
    """Adds the counts of the shards to what is known."""

    def count(shard: ShardEntry) -> list[np.ndarray]:
        try:
            index = read_shard_index(store, raw.folder, shard.stem, shard.index_digest)
        except StoreNotFound:
            where = f"{store.uri(raw.folder)}/{shard.stem}"
            raise DataError(f"{where}: its index is gone; delete its done record and run ingest again") from None
        return _count_rows(kept.taken_of(store, shard.number, index), [*known])

    for shard, found in zip(shards, threads.map(count, shards), strict=True):
        for counts, rows in zip(known.values(), found, strict=True):
            counts[_content(shard, kept)] = rows


def _count_rows(index: pa.Table, rules: Sequence[SizeRule]) -> list[np.ndarray]:
    """For each rule (sides + 1, 2): the rows of a raw index by nearest bucket and split; each size is placed once."""
    sizes = image_sizes(index)
    distinct, which = np.unique(sizes[:, 0] << 32 | sizes[:, 1], return_inverse=True)
    sizes = np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1)
    splits = pc.equal(index["split"], SPLITS[1]).to_numpy().astype(np.int64)
    counts = []
    for rule in rules:
        places, taken = rule.place(sizes)
        cells = np.where(taken, places, len(rule.sides))[which] * len(SPLITS) + splits
        found = np.bincount(cells, minlength=(len(rule.sides) + 1) * len(SPLITS))
        counts.append(found.reshape(-1, len(SPLITS)).astype(np.int32))
    return counts


def _content(shard: ShardEntry, kept: KeptRows) -> str:
    """What a record names a shard by: an index with other rows is counted again, and so is another part of it."""
    name, keep = shard.index_digest or shard.stem, kept.lists.get(shard.number)
    return parts_digest(name, keep.digest) if keep else name


def _counts_of(raw: Manifest, kept: KeptRows, rule: SizeRule, known: dict[str, np.ndarray]) -> RawBuckets:
    rows = np.array([known[_content(shard, kept)] for shard in raw.shards], dtype=np.int32)
    rows = rows.reshape(-1, len(rule.sides) + 1, len(SPLITS))
    return RawBuckets(rule.sides, tuple(shard.number for shard in raw.shards), rows[:, :-1], rows[:, -1])


def _path(raw: Manifest, rule: SizeRule) -> str:
    named = [*(bucket_name(side) for side in rule.sides), rule.min_scale]
    return f"{raw.folder}/{COUNTED}{fingerprint(named)}.json"


def _read_records(store: Store, raw: Manifest, rules: Sequence[SizeRule]) -> _Known:
    return {rule: _read(store, _path(raw, rule), len(rule.sides) + 1) for rule in dict.fromkeys(rules)}


def _write_records(store: Store, raw: Manifest, kept: KeptRows, known: _Known) -> None:
    for rule, counts in known.items():
        names = [_content(shard, kept) for shard in raw.shards if _content(shard, kept) in counts]
        rows = np.array([counts[name] for name in names], dtype="<i4")
        packed = base64.b64encode(zlib.compress(rows.tobytes())).decode()
        store.put_json(_path(raw, rule), sealed({"shards": names, "rows": packed}))


def _read(store: Store, path: str, cells: int) -> dict[str, np.ndarray]:
    """By `_content`; nothing where there is no record, or one that is damaged."""
    try:
        record = store.get_json(path)
    except (StoreNotFound, StoreDamaged):
        return {}
    if not isinstance(record, dict) or record.get("sha256") != own_digest(record):
        return {}
    rows = np.frombuffer(zlib.decompress(base64.b64decode(record["rows"])), dtype="<i4")
    return dict(zip(record["shards"], rows.reshape(-1, cells, len(SPLITS)), strict=True))


def merges_of(rows: RawBuckets, global_batch: int) -> dict[Side, Side]:
    """Which buckets go to which, by the images to train on: `merged_buckets` of a whole data set."""
    return merged_buckets(rows.to_train_on(), global_batch)


def after_merging(rows: RawBuckets, merged: dict[Side, Side]) -> UnitCounts:
    """What there will be to train on, as of one shard."""
    totals: Counter[str] = Counter()
    for side, count in rows.to_train_on().items():
        totals[bucket_name(merged.get(side, side))] += count
    names = sorted(totals)
    return UnitCounts(np.array([[totals[name] for name in names]]), tuple(names))


def merging_note(rows: RawBuckets, merged: dict[Side, Side], global_batch: int) -> str | None:
    """What is said of buckets that are merged; None where none is."""
    if not merged:
        return None
    there = rows.to_train_on()
    images = sum(there[side] for side in merged)
    most = max(cut_off(side, target) for side, target in merged.items())
    pairs = [f"{bucket_name(side)} to {bucket_name(target)}" for side, target in merged.items()]
    return (
        f"{counted(images, 'image')} of sizes with fewer images than a batch of {global_batch} cropped to the nearest size that has"
        f" more, at most {most:.1%} more of each cut off ({some(pairs, len(pairs))} px)"
    )


def too_small_note(rows: RawBuckets, min_scale: float) -> str | None:
    """What is said of images that a phase leaves out for their size; None where it takes all."""
    small = int(rows.too_small.sum(dtype=np.int64))
    if not small:
        return None
    images = small + int(rows.rows.sum(dtype=np.int64))
    held_out = int(rows.too_small[:, SPLITS.index("held_out")].sum(dtype=np.int64))
    return (
        f"{small:,} of {counted(images, 'image')} left out, {held_out:,} of them held out: they do not fill their bucket"
        f" (min_scale {min_scale:g}; a smaller one enlarges them)"
    )
