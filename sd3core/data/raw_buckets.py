"""Counts a data set's images by bucket, before any of them is encoded.

Ingest wrote their sizes into the raw shards' indexes. A shard is counted once for each list of buckets, and a record beside the
raw shards keeps the counts: where it stands no index is read.
"""

from __future__ import annotations

import base64
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sd3core.buckets import Side, bucket_name, cut_off, merged_buckets, nearest_bucket
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.records import own_digest, sealed
from sd3core.data.shards import read_shard_index
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.data.uncaptioned import SPLITS
from sd3core.data.unit_counts import UnitCounts
from sd3core.errors import DataError
from sd3core.specs import fingerprint
from sd3core.words import counted, some

COUNTED = "BUCKETS."  # begins the name of the record, beside the raw shards
COUNTING_THREADS = 16


@dataclass(frozen=True, eq=False)
class RawBuckets:
    """How many images of each raw shard are nearest to each bucket, whatever becomes of them."""

    sides: tuple[Side, ...]
    numbers: tuple[int, ...]  # of the shards
    rows: np.ndarray  # (shards, sides, 2) int32: to train on, held out

    def to_train_on(self) -> dict[Side, int]:
        """Of all shards; buckets without any are left out."""
        totals = self.rows[:, :, SPLITS.index("train")].sum(axis=0, dtype=np.int64).tolist()
        return {side: total for side, total in zip(self.sides, totals, strict=True) if total}

    def shards_with(self, side: Side) -> set[int]:
        """The numbers of the shards that have images of a bucket."""
        there = self.rows[:, self.sides.index(side)].any(axis=1)
        return {number for number, found in zip(self.numbers, there.tolist(), strict=True) if found}


def read_raw_buckets(
    store: Store, raw: Manifest, sides: tuple[Side, ...], *, at_most: int | None = None, remember: bool = True
) -> RawBuckets | None:
    """Reads the indexes of the shards that the record lacks; None where these are more than `at_most`.

    `remember` writes the record, which one process does. DataError where an index is gone or damaged.
    """
    path = f"{raw.folder}/{COUNTED}{fingerprint([bucket_name(side) for side in sides])}.json"
    known = _read(store, path, len(sides))
    new = [shard for shard in raw.shards if _content(shard) not in known]
    if at_most is not None and len(new) > at_most:
        return None

    @lru_cache(maxsize=1 << 16)
    def place_of(width: int, height: int) -> int:
        return sides.index(nearest_bucket(width, height, sides))

    def count(shard: ShardEntry) -> np.ndarray:
        try:
            index = read_shard_index(store, raw.folder, shard.stem, shard.index_digest)
        except StoreNotFound:
            where = f"{store.uri(raw.folder)}/{shard.stem}"
            raise DataError(f"{where}: its index is gone; delete its done record and run ingest again") from None
        counts = np.zeros((len(sides), len(SPLITS)), dtype=np.int32)
        columns = (index[name].to_pylist() for name in ("width", "height", "split"))
        for width, height, split in zip(*columns, strict=True):
            counts[place_of(width, height), SPLITS.index(split)] += 1
        return counts

    with ThreadPoolExecutor(COUNTING_THREADS, thread_name_prefix="sizes") as threads:
        known |= zip(map(_content, new), threads.map(count, new), strict=True)
    rows = np.array([known[_content(shard)] for shard in raw.shards], dtype=np.int32).reshape(
        -1, len(sides), len(SPLITS)
    )
    if new and remember:
        packed = base64.b64encode(zlib.compress(rows.astype("<i4").tobytes())).decode()
        store.put_json(path, sealed({"shards": [_content(shard) for shard in raw.shards], "rows": packed}))
    return RawBuckets(sides, tuple(shard.number for shard in raw.shards), rows)


def _content(shard: ShardEntry) -> str:
    """What the record names a shard by: an index with other rows is counted again."""
    return shard.index_digest or shard.stem


def _read(store: Store, path: str, sides: int) -> dict[str, np.ndarray]:
    """By `_content`; nothing where there is no record, or one that is damaged."""
    try:
        record = store.get_json(path)
    except (StoreNotFound, StoreDamaged):
        return {}
    if not isinstance(record, dict) or record.get("sha256") != own_digest(record):
        return {}
    rows = np.frombuffer(zlib.decompress(base64.b64decode(record["rows"])), dtype="<i4")
    return dict(zip(record["shards"], rows.reshape(-1, sides, len(SPLITS)), strict=True))


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
