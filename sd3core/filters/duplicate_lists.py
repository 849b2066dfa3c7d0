"""Stores which rows go as near-duplicates: parts of many shards each, and a record of them, written last.

    keep/SPEC/DUPLICATES.INPUTS.00000.parquet    a row for each that goes, of PART_SHARDS shards of the raw manifest
    keep/SPEC/DUPLICATES.INPUTS.json             the digest of every part, and of what each shard loses

So who makes a shard's keep-list reads one part, and a shard is made again where what it loses has changed.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from sd3core.data.records import own_digest, record_bytes, sealed
from sd3core.data.shards import check_digest, parts_digest
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.filters.near_duplicates import Duplicate

PART_SHARDS = 1_000
DUPLICATES_SCHEMA = pa.schema(
    [("shard", pa.int64()), ("key", pa.string()), ("of", pa.string()), ("of_shard", pa.int64()), ("leaked", pa.bool_())]
)


@dataclass(frozen=True)
class DuplicatePart:
    """Where a shard's own rows that go are listed."""

    path: str
    digest: str

    def of_shard(self, store: Store, number: int) -> dict[str, Duplicate]:
        """By key. DataError where the part is damaged."""
        data = store.get(self.path)
        check_digest(data, self.digest, store.uri(self.path))
        table = pq.read_table(io.BytesIO(data), filters=[("shard", "=", number)])
        return {row["key"]: Duplicate(**row) for row in table.to_pylist()}


@dataclass(frozen=True)
class DuplicateLists:
    parts: dict[int, DuplicatePart]  # by the number of a shard that loses rows
    digests: dict[int, str]  # likewise: which rows, and for which others


def write_duplicates(store: Store, record: str, shards: Sequence[int], found: Iterable[Duplicate]) -> None:
    """`record`: its path. `shards`: the numbers of all, in the order of the raw manifest."""
    by_shard: dict[int, list[Duplicate]] = defaultdict(list)
    for duplicate in found:
        by_shard[duplicate.shard].append(duplicate)
    parts, losing = {}, {}
    for start in range(0, len(shards), PART_SHARDS):
        own = [number for number in shards[start : start + PART_SHARDS] if number in by_shard]
        rows = [vars(row) for number in own for row in sorted(by_shard[number], key=lambda row: row.key)]
        if not rows:
            continue
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA), sink, compression="zstd")
        path = f"{record.removesuffix('.json')}.{start // PART_SHARDS:05d}.parquet"
        store.put(path, sink.getvalue())
        parts[path] = record_bytes(sink.getvalue()).sha256
        for number in own:
            named = sorted(f"{row.key}\n{row.of}\n{row.of_shard}" for row in by_shard[number])
            losing[f"{number}"] = [path, parts_digest(*named)]
    store.put_json(record, sealed({"parts": parts, "shards": losing}))


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
