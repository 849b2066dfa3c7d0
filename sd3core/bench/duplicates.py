"""Measures how well the built-in hash finds planted near-duplicates.

The tuning pictures chose sd3core.recipe_filter.HASH_THRESHOLD; the test pictures, of other scenes and photographs, are reported.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from sd3core.bench.planted import ALTERATIONS, PlantedPicture, distinct_pictures, planted
from sd3core.filters.near_duplicates import DuplicateSearch, FeatureRows, find_duplicates, state_bytes
from sd3core.filters.picture_hash import HASH_BYTES, picture_hash
from sd3core.recipe_filter import HASH_THRESHOLD

SHARD_ROWS = 256
SEEDS = {"tuning": 11, "test": 12}
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class DuplicatesBench:
    scenes: int = 1_900
    planted: int = 300  # of each kind, of as many distinct pictures
    threshold: float = HASH_THRESHOLD
    rows_per_cluster: int = 256  # a sixteenth of a recipe's: so that clusters have borders here, too
    pictures: Literal["tuning", "test"] = "test"


@dataclass(frozen=True)
class Share:
    """`right` of `all`, with Wilson's interval of 95 %."""

    right: int
    all: int

    @property
    def value(self) -> float:
        return self.right / self.all if self.all else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.all:
            return 0.0, 1.0
        n, share, z = self.all, self.value, NORMAL_95
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class FoundPairs:
    """Of one kind of alteration: which planted pictures go or leave the first, and whether what goes is like what stays."""

    kind: str
    recall: Share
    precision: Share


@dataclass(frozen=True)
class DuplicatesResult:
    distinct: int
    found: list[FoundPairs]
    state_bytes: int  # on disk, for a row


def measure_duplicates(bench: DuplicatesBench, show: Callable[[str], None] = lambda what: None) -> DuplicatesResult:
    """Each kind is planted among the same distinct pictures, and looked for alone."""
    seed = SEEDS[bench.pictures]
    show("drawing")
    with tempfile.TemporaryDirectory(prefix="sd3-bench-") as folder:
        distinct = list(distinct_pictures(bench.scenes, seed, Path(folder), odd=bench.pictures == "test"))
    hashes = np.stack([picture_hash(picture.image) for picture in distinct])
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(distinct))[: bench.planted]
    found = []
    for kind in ALTERATIONS:
        show(kind)
        copies = [planted(distinct[place], kind, rng) for place in chosen]
        own = np.stack([picture_hash(copy.image) for copy in copies])
        found.append(_find(bench, kind, [*distinct, *copies], np.concatenate([hashes, own]), rng))
    return DuplicatesResult(len(distinct), found, state_bytes(HASH_BYTES))


def _find(
    bench: DuplicatesBench, kind: str, pictures: Sequence[PlantedPicture], hashes: np.ndarray, rng: np.random.Generator
) -> FoundPairs:
    order = rng.permutation(len(pictures))  # over the shards
    parts = [order[start : start + SHARD_ROWS] for start in range(0, len(order), SHARD_ROWS)]

    def read(shard: int) -> FeatureRows:
        rows = parts[shard]
        keys = pa.array([pictures[row].key for row in rows])
        return FeatureRows(shard, keys, np.zeros(len(rows), dtype=bool), hashes[rows])

    search = DuplicateSearch(bench.threshold, True, bench.rows_per_cluster, 16_000, seed=0)
    shards = [(number, len(rows)) for number, rows in enumerate(parts)]
    gone = find_duplicates(read, shards, search).select(["key", "of"]).to_pylist()
    of = {picture.key: picture.of for picture in pictures}
    true = {of[row["key"]] for row in gone if of[row["key"]] == of[row["of"]]}
    return FoundPairs(kind, Share(len(true), bench.planted), Share(len(true), len(gone)))
