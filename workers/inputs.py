"""What a shard is made from: a shard of an earlier stage, named by its manifest and checked against it."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sd3core.data.manifest import Manifest
from sd3core.data.shards import INDEX, read_raw_samples
from sd3core.data.store import Store
from sd3core.errors import DataError

if TYPE_CHECKING:
    from sd3core.recipe import Compute

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class InputShard:
    folder: str
    stem: str
    digest: str  # sha256 of its main file
    rows: int
    index_digest: str | None = None


def input_shards(manifest: Manifest) -> dict[int, InputShard]:
    """By number: shard 42 of a stage is made from shard 42 of the stages before it."""
    return {e.number: InputShard(manifest.folder, e.stem, e.digest, e.rows, e.index_digest) for e in manifest.shards}


def read_images(store: Store, shard: InputShard) -> Iterator[tuple[str, bytes]]:
    """(key, encoded image) of every sample of a raw shard. Raises DataError when it is not the shard its manifest
    names.
    """
    for key, files in read_raw_samples(store, shard.folder, shard.stem, shard.digest):
        image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
        if image is None:
            raise DataError(f"{store.uri(shard.folder)}/{shard.stem}.tar: {key} has no {' or '.join(IMAGE_EXTENSIONS)}")
        yield key, image


def read_input_index(store: Store, shard: InputShard) -> pa.Table:
    return _read_checked(store, f"{shard.folder}/{shard.stem}{INDEX}", shard.index_digest)


def read_input_table(store: Store, shard: InputShard) -> pa.Table:
    return _read_checked(store, f"{shard.folder}/{shard.stem}.parquet", shard.digest)


def _read_checked(store: Store, path: str, digest: str | None) -> pa.Table:
    data = store.get(path)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise DataError(
            f"{store.uri(path)}: its bytes are not those of its manifest;"
            " delete the shard's done record and run the stage again"
        )
    return pq.read_table(io.BytesIO(data))


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


def actor_device(compute: Compute) -> str:
    return "cuda" if compute.gpus_per_actor > 0 else "cpu"


def decode_threads(compute: Compute) -> int:
    return max(1, int(compute.cpus_per_actor))
