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
from sd3core.data.manifest import Manifest
from sd3core.data.shards import IMAGE_DIGEST, image_of, read_raw_samples, read_shard_index, read_table
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


def input_shards(manifest: Manifest) -> dict[int, InputShard]:
    """A manifest's shards by number: shard 42 of a stage is made from shard 42 of the stages before it."""
    return {
        e.number: InputShard(manifest.folder, e.stem, e.digest, e.rows, e.index_digest, e.bytes)
        for e in manifest.shards
    }


def shard_images(store: Store, shard: InputShard) -> Iterator[tuple[str, bytes]]:
    """(key, encoded image) of every sample of a raw shard. Raises DataError when it is not the shard its manifest
    names.
    """
    for key, files in read_raw_samples(store, shard.folder, shard.stem, shard.digest):
        yield key, image_of(files, f"{store.uri(shard.folder)}/{shard.stem}.tar: {key}")


def read_input_index(store: Store, shard: InputShard) -> pa.Table:
    return read_shard_index(store, shard.folder, shard.stem, shard.index_digest)


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
