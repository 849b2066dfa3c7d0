"""Stores which rows go as near-duplicates, in parts of many shards each.

A record of the parts is written last.

    keep/SPEC/DUPLICATES.INPUTS.00000.parquet    a row for each that goes, of PART_SHARDS shards of the raw manifest
    keep/SPEC/DUPLICATES.INPUTS.json             the digest of every part, and of what each shard loses

So who makes a shard's keep-list reads one part, and a shard is made again where what it loses has changed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sd3core.data.records import own_digest, record_bytes, sealed
from sd3core.data.shards import parts_digest
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.errors import DataError

PART_SHARDS = 1_000


@dataclass(frozen=True)
class Duplicate:
    """A row of DUPLICATES_SCHEMA."""

    shard: int
    key: str
    of: str
    of_shard: int
    leaked: bool


@dataclass(frozen=True)
class DuplicatePart:
    """Where a shard's own rows that go are listed."""

    path: str
    digest: str

    def read(self, store: Store) -> pa.Table:
        """Of all its shards. DataError where it is damaged."""
        data = store.get(self.path)
        if record_bytes(data).sha256 != self.digest:
            raise DataError(f"{store.uri(self.path)}: damaged; delete it and run the filter stage again")
        return pq.read_table(io.BytesIO(data))


@dataclass(frozen=True)
class DuplicateLists:
    parts: dict[int, DuplicatePart]  # by the number of a shard that loses rows
    digests: dict[int, str]  # likewise: which rows, and for which others


def write_duplicates(store: Store, record: str, shards: Sequence[int], found: pa.Table) -> None:
    """`record`: its path. `shards`: the numbers of all, in the order of the raw manifest. `found`: as DUPLICATES_SCHEMA has it."""
    found = found.take(pc.sort_indices(found, sort_keys=[("shard", "ascending"), ("key", "ascending")]))
    numbers = found["shard"].to_numpy()
    parts: dict[str, str] = {}
    losing: dict[str, list[str]] = {}
    for start in range(0, len(shards), PART_SHARDS):
        own = {number: found.slice(*_range(numbers, number)) for number in shards[start : start + PART_SHARDS]}
        own = {number: rows for number, rows in own.items() if len(rows)}
        if not own:
            continue
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables([*own.values()]), sink, compression="zstd")
        path = f"{record.removesuffix('.json')}.{start // PART_SHARDS:05d}.parquet"
        store.put(path, sink.getvalue())
        parts[path] = record_bytes(sink.getvalue()).sha256
        for number, rows in own.items():
            named = zip(*(rows[name].to_pylist() for name in ("key", "of", "of_shard", "leaked")), strict=True)
            losing[f"{number}"] = [path, parts_digest(*(f"{row}" for row in named))]
    store.put_json(record, sealed({"parts": parts, "shards": losing}))


def _range(numbers: np.ndarray, number: int) -> tuple[int, int]:
    """(start, length) of a number among sorted ones."""
    start, stop = np.searchsorted(numbers, [number, number + 1]).tolist()
    return start, stop - start


def read_duplicates(store: Store, record: str) -> DuplicateLists | None:
    """None where there is no such record, one that is damaged, or a part of it is gone."""
    try:
        said = store.get_json(record)
        if said.get("sha256") != own_digest(said) or not all(map(store.exists, said["parts"])):
            return None
    except (StoreNotFound, StoreDamaged, AttributeError, KeyError):
        return None
    parts, digests = {}, {}
    for number, (path, digest) in said["shards"].items():
        parts[int(number)] = DuplicatePart(path, said["parts"][path])
        digests[int(number)] = digest
    return DuplicateLists(parts, digests)
