"""Counts the rows to train on by shard and bucket.

It also says what becomes of buckets that do not fill a batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from sd3core.data.encoded_shards import Split, held_out_count
from sd3core.data.manifest import Manifest
from sd3core.words import counted, some

SMALL_BUCKETS_SHARE = 0.02  # of all rows, that may be left out for standing in buckets of less than a batch
BUCKET = re.compile(r"[0-9]+x[0-9]+")  # its name, among a shard's counts


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """How many rows there are to train on: `rows` (shards, buckets), in the order of the manifest and of `buckets`."""

    rows: np.ndarray
    buckets: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.rows.sum(dtype=np.int64))


def rows_in_manifest(latents: Manifest, split: Split) -> UnitCounts:
    """Rows of a split by shard and bucket, with a caption or without."""
    counts = [shard.buckets for shard in latents.shards]
    names = sorted({name for found in counts for name in found if BUCKET.fullmatch(name)})
    rows = np.zeros((len(counts), len(names)), dtype=np.int32)
    for code, name in enumerate(names):
        held_out = [found.get(held_out_count(name), 0) for found in counts]
        rows[:, code] = held_out
        if split == "train":
            rows[:, code] = np.subtract([found.get(name, 0) for found in counts], held_out)
    return UnitCounts(rows, tuple(names))


def small_buckets(counts: UnitCounts, global_batch: int) -> dict[str, int]:
    """The buckets that an epoch does not fill a batch of, with their rows: a step would show the same few several times."""
    rows = counts.rows.sum(axis=0, dtype=np.int64).tolist()
    return {name: count for name, count in zip(counts.buckets, rows, strict=True) if 0 < count < global_batch}


def leave_out_small_buckets(counts: UnitCounts, global_batch: int) -> UnitCounts:
    """The counts without `small_buckets`, where these have at most SMALL_BUCKETS_SHARE of all rows; else as they are."""
    small = small_buckets(counts, global_batch)
    if sum(small.values()) > SMALL_BUCKETS_SHARE * len(counts):
        return counts
    kept = [name not in small for name in counts.buckets]
    return UnitCounts(counts.rows * np.array(kept, dtype=counts.rows.dtype), counts.buckets)


def small_buckets_warning(counts: UnitCounts, global_batch: int) -> str | None:
    """What is said of buckets that do not fill a batch; None where all do."""
    small = small_buckets(counts, global_batch)
    if not small:
        return None
    rows = sum(small.values())
    what = f"{counted(rows, 'image')} in buckets with fewer images than a batch of {global_batch} ({some([*small], len(small))} px)"
    if len(leave_out_small_buckets(counts, global_batch)) < len(counts):
        return f"{what} left out of training: a step of theirs would show the same few again and again"
    return (
        f"{what}, {rows / len(counts):.0%} of all: their steps show images several times; fewer buckets (aspect_ratios,"
        " buckets.max_ratio) or a smaller global_batch would not"
    )
