"""Compares reading a data set by the loader with plain reading of the same tars.

Encoded shards of random values, of sd3-2b's sizes, are written to a folder of a store and removed at the end. An epoch of
them is then read in turn by

    loader      plan, loader, reader and cache, as a rank of one reads: every row in the plan's order, by ranges, in the
                pieces of a large data set (of a small one every row is a piece)
    webdataset  the tars from front to back with the library webdataset (a store of files)
    boto3       the tars from front to back, each by one streamed request (a store on S3)

All compute the SHA-256 of every file, decode the same tensors and stack the same batches. They run on one core: what
is compared is the work, not how many threads do it. What a server of S3 computes is its own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sd3core.bench.measure import interleaved, median_ratio
from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.costs.phases import RELEASED_WIDTHS
from sd3core.data.encoded_shards import (
    FEATURES,
    LATENT_SCHEMA,
    ORIGINAL,
    TEXT_SCHEMA,
    latent_bytes,
    latent_of,
)
from sd3core.data.loader import BatchLoader
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.shards import TAR_BLOCK, Sample, parts_digest, shard_stem, write_shard
from sd3core.data.store import FileStore, Store
from sd3core.data.store.s3 import S3Store
from sd3core.data.stored_text import StoredText
from sd3core.data.training_plan import PIECE_ROWS, TrainingPlan
from sd3core.errors import UserError
from sd3core.specs import TAR
from sd3core.words import GB

LOADER, WEBDATASET, BOTO3 = "loader", "webdataset", "boto3"
BODY_CHUNK_BYTES = 1 << 20  # of a streamed body


@dataclass(frozen=True)
class DataBench:
    """What is measured: one bucket of `side_px` squares, a caption of `tokens` CLIP and as many T5 tokens a row."""

    shards: int = 4
    rows: int = 128  # of a shard
    side_px: int = 256
    tokens: int = 77
    batch: int = 32
    rounds: int = 5

    @property
    def stored_bytes(self) -> int:
        """About what the shards take, in 16 bits."""
        text = self.tokens * sum(RELEASED_WIDTHS[name] for name in ENCODERS)
        return 2 * self.shards * self.rows * (text + 16 * (self.side_px // 8) ** 2)

    @property
    def bucket(self) -> str:
        return f"{self.side_px}x{self.side_px}"

    @property
    def steps(self) -> int:
        return self.shards * self.rows // self.batch


@dataclass(frozen=True)
class DataResult:
    """Of one round all contenders read the same rows; `row_bytes` are those of a row's two files in their tars."""

    rows: int
    row_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, other: str) -> float:
        """How many times as fast as `other` the loader is."""
        return median_ratio(self.seconds[other], self.seconds[LOADER])


@dataclass(frozen=True)
class _Stored:
    store: Store
    latents: Manifest
    text: Manifest

    def tars(self, manifest: Manifest) -> list[str]:
        return [f"{manifest.folder}/{shard.stem}{TAR}" for shard in manifest.shards]


def measure_data(
    settings: DataBench, store: Store, on_round: Callable[[int], None] | None = None, say: Callable[[str], None] = print
) -> DataResult:
    """Writes the shards, reads them `rounds` times in each way, and removes them.

    UserError where a disk has no room for them; StoreError where the store fails.
    """
    if isinstance(store, FileStore):
        _check_room(settings, store)
    with _shards(settings, store, say) as stored, one_core():
        ways = {LOADER: lambda: read_by_loader(settings, stored)}
        if store.local_path(stored.tars(stored.latents)[0]) is not None:
            ways[WEBDATASET] = lambda: read_by_webdataset(settings, stored)
        if isinstance(store, S3Store):
            ways[BOTO3] = lambda: read_by_boto3(settings, stored)
        size = (stored.latents.bytes + stored.text.bytes) // (settings.shards * settings.rows)
        return DataResult(
            settings.steps * settings.batch, size, interleaved(ways, settings.rounds, torch.device("cpu"), on_round)
        )


def _check_room(settings: DataBench, store: FileStore) -> None:
    folder = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if settings.stored_bytes > free:
        raise UserError(
            f"{store.url}: {settings.stored_bytes / GB:,.1f} GB of shards where {free / GB:,.1f} GB are free;"
            " fewer --shards or --rows, or another --store"
        )


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and the threads that it starts, on one core, where the system can do that (Linux)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if before:
        os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before:
            os.sched_setaffinity(0, before)


def read_by_loader(settings: DataBench, stored: _Stored) -> str:
    """An epoch as a rank reads it, with an empty cache, so that every file is hashed. Returns a digest of what was read,
    whatever its order.
    """
    tokens = {"clip_tokens": settings.tokens, "t5_tokens": settings.tokens}
    with tempfile.TemporaryDirectory(prefix="sd3-bench-") as folder:
        cache = ShardCache(stored.store, Path(folder), 10 * (stored.latents.bytes + stored.text.bytes))
        reader = ShardReader(stored.store, stored.latents, stored.text, cache, **tokens)
        plan = TrainingPlan(reader.counts()[0], 0, settings.batch, PIECE_ROWS)
        loader = BatchLoader(
            reader, plan, original_fraction=1.0, seed=0, rank=0, world=1, steps=settings.steps, threads=1
        )
        try:
            batches = ((b.latent, b.text) for b in map(loader.batch, range(settings.steps)))
            return _consumed(batches)
        finally:
            loader.close()
            cache.close()


def read_by_webdataset(settings: DataBench, stored: _Stored) -> str:
    """Latents and text from front to back; a row's two files have the same place in both."""
    import webdataset  # here, as boto3 below: the other bench has the same tables, and needs neither

    def files(manifest: Manifest) -> Iterator[bytes]:
        urls = [str(stored.store.local_path(path)) for path in stored.tars(manifest)]
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            yield sample[FEATURES]

    return _consumed(_batches(settings, files(stored.latents), files(stored.text)))


def read_by_boto3(settings: DataBench, stored: _Stored) -> str:
    """As `read_by_webdataset`, by one streamed request a tar."""
    import boto3

    store, client = stored.store, boto3.session.Session().client("s3")

    def files(manifest: Manifest) -> Iterator[bytes]:
        for path in stored.tars(manifest):
            key = f"{store.prefix}/{path}" if store.prefix else path
            body = client.get_object(Bucket=store.bucket, Key=key)["Body"]
            with tarfile.open(fileobj=body, mode="r|", bufsize=BODY_CHUNK_BYTES) as tar:
                for member in tar:
                    yield tar.extractfile(member).read()

    return _consumed(_batches(settings, files(stored.latents), files(stored.text)))


def _batches(
    settings: DataBench, latents: Iterator[bytes], captions: Iterator[bytes]
) -> Iterator[tuple[torch.Tensor, StoredText]]:
    tokens = {"clip_tokens": settings.tokens, "t5_tokens": settings.tokens}
    pairs = zip(latents, captions, strict=True)
    for _ in range(settings.steps):
        rows = list(itertools.islice(pairs, settings.batch))
        for latent, caption in rows:
            hashlib.sha256(latent).digest()
            hashlib.sha256(caption).digest()
        text = StoredText.from_bytes([caption for _, caption in rows], **tokens)
        yield torch.stack([latent_of(latent) for latent, _ in rows]), text


def _consumed(batches: Iterator[tuple[torch.Tensor, StoredText]]) -> str:
    """Takes one value of each row, so that two ways can be seen to have read the same rows, and lets them go."""
    marks = [
        pair
        for latent, text in batches
        for pair in zip(latent[:, 0, 0, 0].tolist(), text.tensors["clip_l_pooled"][:, 0].tolist(), strict=True)
    ]
    return hashlib.sha256(repr(sorted(marks)).encode()).hexdigest()


@contextmanager
def _shards(settings: DataBench, store: Store, say: Callable[[str], None]) -> Iterator[_Stored]:
    folder = f"bench-data-{uuid.uuid4().hex[:12]}"
    generator = torch.Generator().manual_seed(0)
    say(f"writing {settings.shards} shards of {settings.rows} rows below {store.uri(folder)}")
    try:
        made: dict[str, list[ShardEntry]] = {"latents": [], "text": []}
        for number in range(settings.shards):
            made["latents"].append(_write_latents(settings, store, f"{folder}/latents", number, generator))
            made["text"].append(_write_text(settings, store, f"{folder}/text", number, generator))
        fields = {"spec": "0" * 12, "fields": {}, "inputs": {"raw": "bench"}}
        yield _Stored(
            store,
            Manifest(stage="latents", folder=f"{folder}/latents", shards=made["latents"], **fields),
            Manifest(stage="text", folder=f"{folder}/text", shards=made["text"], **fields),
        )
    finally:
        for entry in store.list(f"{folder}/"):
            store.delete(entry.path)


def _write_latents(
    settings: DataBench, store: Store, folder: str, number: int, generator: torch.Generator
) -> ShardEntry:
    side = settings.side_px // 8

    def samples() -> Iterator[Sample]:
        for row in range(settings.rows):
            data = latent_bytes(torch.randn(16, side, side, generator=generator).half())
            known = {"bucket": settings.bucket, "split": "train", "sha256": hashlib.sha256(data).digest()}
            known |= {f"crop_{name}": 0 for name in ("top", "left", "height", "width")}
            yield Sample(_key(number, row), {FEATURES: data}, known)

    stem = shard_stem(number, parts_digest(folder, str(number)))
    return ShardEntry.of(write_shard(store, folder, stem, samples(), [], LATENT_SCHEMA, count_by="bucket"))


def _write_text(settings: DataBench, store: Store, folder: str, number: int, generator: torch.Generator) -> ShardEntry:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def samples() -> Iterator[Sample]:
        offset = 0
        for row in range(settings.rows):
            features = TextFeatures(
                **{name: drawn(1, settings.tokens, RELEASED_WIDTHS[name]) for name in ENCODERS},
                clip_l_pooled=drawn(1, RELEASED_WIDTHS["clip_l"]),
                clip_g_pooled=drawn(1, RELEASED_WIDTHS["clip_g_pooled"]),
                lengths=torch.full((1, 3), settings.tokens),
            )
            data = StoredText.of(features, "float16").to_bytes("trimmed")
            length = TAR_BLOCK * (1 + math.ceil(len(data) / TAR_BLOCK))
            known: dict[str, Any] = {"key": _key(number, row), "kind": ORIGINAL, "caption_id": f"c{number}-{row}"}
            known |= {"offset": offset, "length": length, "sha256": hashlib.sha256(data).digest()}
            known |= {f"{name}_len": settings.tokens for name in ENCODERS}
            yield Sample(known["caption_id"], {FEATURES: data}, known)
            offset += length

    stem = shard_stem(number, parts_digest(folder, str(number)))
    return ShardEntry.of(write_shard(store, folder, stem, samples(), [], TEXT_SCHEMA))


def _key(number: int, row: int) -> str:
    return f"{number:05d}-{row:05d}"
