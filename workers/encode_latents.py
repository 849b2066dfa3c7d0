"""Encodes the images of one shard into VAE latents, a bucket at a time.

Threads decode ahead of the encoding.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import torch

from sd3core.buckets import Side, bucket_name, nearest_bucket
from sd3core.data.encoded_shards import FEATURES, LATENT_SCHEMA, held_out_count, latent_bytes
from sd3core.data.images import Crop, PixelRules, crop_to, decode_image, enlargement, naming, to_model_range
from sd3core.data.manifest import ManifestRef
from sd3core.data.shards import DoneRecord, FailedRow, Sample, write_shard
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError
from sd3core.progress import ProgressCallback, ignore_progress
from sd3core.towers.artifact import fetch_towers
from workers.caches import towers_cache
from workers.inputs import InputShard, map_ahead, read_input_index, shard_images
from workers.shard_stage import ShardTask

# Counted beside the buckets. A bucket's sides are whole patches, which alone stretches an image by some percent.
ENLARGED = {over: f"enlarged over {over:g} times" for over in (1.1, 2.0, 4.0, 8.0)}


@dataclass(frozen=True)
class LatentsSource:
    raw: InputShard
    buckets: tuple[Side, ...]  # (height, width) px


@dataclass(frozen=True)
class Prepared:
    """A decoded and cropped image, or why there is none."""

    key: str
    bucket: Side | None = None
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    crop: Crop | None = None
    enlarged: float = 0.0  # times, each way
    error: str | None = None


class LatentsWorker:
    """Raw shard -> latents tar, in batches of one bucket; threads decode ahead of the encoding."""

    def __init__(
        self,
        store: Store,
        towers: ManifestRef,
        dtype: str,
        batch: int,
        rules: PixelRules,
        threads: int,
        device: str,
        report: ProgressCallback = ignore_progress,  # of fetching the autoencoder
    ) -> None:
        from sd3core.towers.autoencoder import load_autoencoder  # here, so that a text worker does not import diffusers

        self.store, self.batch, self.threads = store, batch, threads
        self.rules = rules
        self.dtype = getattr(torch, dtype)
        local = fetch_towers(store, towers.folder, towers_cache(), ("vae",), towers.digest, report)
        self.autoencoder = load_autoencoder(local, torch.float32, device)
        self.progress = 0  # images

    def __call__(self, task: ShardTask) -> DoneRecord:
        self.progress = 0
        index = read_input_index(self.store, task.source.raw)
        splits = dict(zip(index["key"].to_pylist(), index["split"].to_pylist(), strict=True))
        failed: list[FailedRow] = []
        counts: Counter[str] = Counter()
        samples = in_bucket_order(self._samples(task.source, splits, failed, counts), list(splits), counts)
        return write_shard(
            self.store, task.folder, task.stem, samples, failed, LATENT_SCHEMA, count_by="bucket", counts=counts
        )

    def _samples(
        self, source: LatentsSource, splits: dict[str, str], failed: list[FailedRow], counts: Counter[str]
    ) -> Iterator[Sample]:
        waiting: dict[Side, list[Prepared]] = {}
        images = shard_images(self.store, source.raw)
        for item in map_ahead(
            lambda image: self._prepare(*image, source.buckets), images, self.threads, ahead=2 * self.batch
        ):
            if item.error:
                failed.append(FailedRow(key=item.key, reason=item.error))
                self.progress += 1
                continue
            batch = waiting.setdefault(item.bucket, [])
            batch.append(item)
            if len(batch) == self.batch:
                yield from self._encoded(waiting.pop(item.bucket), splits, failed, counts)
        for batch in waiting.values():
            yield from self._encoded(batch, splits, failed, counts)

    def _prepare(self, key: str, data: bytes, buckets: tuple[Side, ...]) -> Prepared:
        try:
            with naming(key):
                image = decode_image(data, self.rules)
        except DataError as error:
            return Prepared(key, error=str(error))
        bucket = nearest_bucket(image.width, image.height, buckets)
        pixels, crop = crop_to(image, *bucket)
        return Prepared(key, bucket, pixels, crop, enlargement(image, *bucket))

    def _encoded(
        self, batch: list[Prepared], splits: dict[str, str], failed: list[FailedRow], counts: Counter[str]
    ) -> Iterator[Sample]:
        images = to_model_range(np.stack([item.pixels for item in batch]))  # (B, 3, H, W)
        latents = self.autoencoder.encode(images).to("cpu", self.dtype)  # (B, 16, H/8, W/8)
        for item, latent in zip(batch, latents, strict=True):
            if not bool(torch.isfinite(latent).all()):
                failed.append(FailedRow(key=item.key, reason=f"its latent is not finite in {self.dtype}"))
                continue
            counts.update(name for over, name in ENLARGED.items() if item.enlarged > over)
            data = latent_bytes(latent)
            row = self._row(item, splits) | {"sha256": hashlib.sha256(data).digest()}
            yield Sample(item.key, {FEATURES: data}, row)
        self.progress += len(batch)

    def _row(self, item: Prepared, splits: dict[str, str]) -> dict[str, Any]:
        crop = item.crop
        return {
            "bucket": bucket_name(item.bucket),
            "crop_top": crop.top,
            "crop_left": crop.left,
            "crop_height": crop.height,
            "crop_width": crop.width,
            "split": splits[item.key],
        }


def in_bucket_order(samples: Iterable[Sample], keys: list[str], counts: Counter[str]) -> Iterator[Sample]:
    """The samples by bucket, those to train on first, then as `keys`, the raw shard, has them; counts the held-out ones.

    Their latents wait on disk: of a shard of large images they are a gigabyte.
    """
    place = {key: number for number, key in enumerate(keys)}
    waiting: list[tuple[str, bool, int, int, int, Sample]] = []
    with tempfile.TemporaryFile(prefix="sd3-latents-") as spool:
        for sample in samples:
            held_out, data = sample.row["split"] == "held_out", sample.files[FEATURES]
            if held_out:
                counts[held_out_count(sample.row["bucket"])] += 1
            order = (sample.row["bucket"], held_out, place[sample.key])
            waiting.append((*order, spool.tell(), len(data), replace(sample, files={})))
            _spool(spool, data)
        for *_, start, length, sample in sorted(waiting, key=lambda item: item[:3]):
            spool.seek(start)
            yield replace(sample, files={FEATURES: spool.read(length)})


def _spool(spool: IO[bytes], data: bytes) -> None:
    try:
        spool.write(data)
        spool.flush()
    except OSError as error:
        raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None
