"""Names the shard that a shard is made from, and checks it when it is read.

The manifest of the earlier stage says which it is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from sd3core.data.earlier_rows import RowName
from sd3core.data.kept_rows import ALL_ROWS, KeepList, KeptRows
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.shards import (
    IMAGE_DIGEST,
    image_of,
    parts_digest,
    read_raw_samples,
    read_shard_index,
    read_table,
)
from sd3core.data.store import Store

if TYPE_CHECKING:
    from sd3core.recipe import Compute

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class InputShard:
    folder: str
    stem: str
    digest: str  # sha256 of its main file
    rows: int
    index_digest: str | None = None
    bytes: int = 0  # of all its files
    kept: KeepList | None = None  # of a raw shard of which a filter keeps but a part

    @property
    def content(self) -> str:
        """Names what is made from it: of a shard that is kept whole as it ever was, its digest."""
        return parts_digest(self.digest, self.kept.digest) if self.kept else self.digest


def input_shards(manifest: Manifest, kept: KeptRows = ALL_ROWS) -> dict[int, InputShard]:
    """A manifest's shards by number: shard 42 of a stage is made from shard 42 of the stages before it.

    `rows` are those that are kept; a shard that keeps none is one all the same.
    """
    shards = {}
    for entry in manifest.shards:
        keep = kept.lists.get(entry.number)
        names = (manifest.folder, entry.stem, entry.digest, keep.rows if keep else entry.rows, entry.index_digest)
        shards[entry.number] = InputShard(*names, entry.bytes, keep)
    return shards


@dataclass(frozen=True)
class Images:
    """The raw data that stages after the filter are made from: which shards, and which rows of them."""

    raw: Manifest
    shards: dict[int, InputShard]
    kept: KeptRows
    inputs: dict[str, str]  # as manifests name them

    @classmethod
    def of(cls, raw: Manifest, raw_digest: str, kept: KeptRows = ALL_ROWS) -> Images:
        return cls(raw, input_shards(raw, kept), kept, {"raw": raw_digest} | kept.inputs)

    @classmethod
    def read(cls, store: Store, raw: ManifestRef, keep: ManifestRef | None) -> Images:
        return cls.of(read_manifest(store, raw.folder, raw.digest), raw.digest, KeptRows.read(store, keep))


def shard_images(store: Store, shard: InputShard) -> Iterator[tuple[str, bytes]]:
    """(key, encoded image) of every sample of a raw shard, kept or not. Raises DataError when it is not the shard its
    manifest names.
    """
    for key, files in read_raw_samples(store, shard.folder, shard.stem, shard.digest):
        yield key, image_of(files, f"{store.uri(shard.folder)}/{shard.stem}.tar: {key}")


def read_input_index(store: Store, shard: InputShard) -> pa.Table:
    """The rows that are kept."""
    index = read_shard_index(store, shard.folder, shard.stem, shard.index_digest)
    return shard.kept.taken_of(store, index) if shard.kept else index


def read_input_table(store: Store, shard: InputShard) -> pa.Table:
    return read_table(store, shard.folder, shard.stem, shard.digest)


def image_digest(name: RowName) -> dict[str, str]:
    """The column that says which image a row was made from, where that is more than its key."""
    return {} if name[1] is None else {IMAGE_DIGEST: name[1]}


def with_image_digest(schema: pa.Schema, raw_index: pa.Table) -> pa.Schema:
    """The columns of what is made from a raw shard: with its images' digests, where it has them."""
    return schema.append(pa.field(IMAGE_DIGEST, pa.string())) if IMAGE_DIGEST in raw_index.column_names else schema


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """work(item) for every item, in order, up to `ahead` of them on threads while the caller uses earlier results."""
    with ThreadPoolExecutor(threads) as executor:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(executor.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def actor_device(compute: Compute) -> str:
    return "cuda" if compute.gpus_per_actor > 0 else "cpu"


def decode_threads(compute: Compute) -> int:
    return max(1, int(compute.cpus_per_actor))
