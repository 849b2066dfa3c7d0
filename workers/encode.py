"""Encoding: text features of every caption (once for all resolutions) and VAE latents of every image for each phase."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save as save_tensors

from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.data.buckets import Side, bucket_name, bucket_sides, nearest_bucket
from sd3core.data.images import Crop, crop_to, decode_image, to_model_range
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shards import (
    BLOCK,
    DoneRecord,
    FailedRow,
    Sample,
    content_digest,
    write_shard,
)
from sd3core.data.store import Store, open_store
from sd3core.errors import UserError
from sd3core.progress import ProgressCallback
from sd3core.recipe import Recipe, Text
from sd3core.specs import latents_fields, latents_folder, text_fields, text_folder
from sd3core.towers import fetch_towers, read_towers
from workers.inputs import (
    InputShard,
    actor_device,
    decode_threads,
    input_shards,
    map_ahead,
    read_images,
    read_input_index,
    read_input_table,
)
from workers.shard_stage import ShardStage, ShardTask, StageResult, remember_stage, run_shard_stages
from workers.towers import towers_cache

NULL = "NULL.safetensors"  # the encoded empty string, beside the text shards
ORIGINAL, SYNTHETIC = "original", "synthetic"
TEXT_SCHEMA = pa.schema(
    [("kind", pa.string()), ("caption_id", pa.string())] + [(f"{name}_len", pa.int32()) for name in ENCODERS]
)
LATENTS_SCHEMA = pa.schema(
    [("bucket", pa.string())]
    + [(f"crop_{side}", pa.int32()) for side in ("top", "left", "height", "width")]
    + [("split", pa.string())]
)


@dataclass(frozen=True)
class TextSource:
    raw: InputShard
    captions: InputShard | None


@dataclass(frozen=True)
class LatentsSource:
    raw: InputShard
    buckets: tuple[Side, ...]  # (height, width) px


def encode_stage(
    recipe: Recipe,
    store: Store,
    raw: ManifestRef,
    captions: ManifestRef | None,
    towers: ManifestRef,
    report: ProgressCallback,
) -> dict[str, StageResult]:
    """{"text": …, "latents.pretrain": …, "latents.finetune.0": …}; phases whose latents are the same share them.

    Raises StageFailed when shards could not be made, DataError when an input is missing or not what its manifest says.
    """
    digests = read_towers(store, towers.folder, towers.digest).digests
    raw_shards = input_shards(read_manifest(store, raw.folder, raw.digest))
    caption_shards = input_shards(read_manifest(store, captions.folder, captions.digest)) if captions else {}
    stages = {"text": _text_stage(recipe, digests, raw, raw_shards, captions, caption_shards)}
    folders: dict[str, str] = {}  # latents folder -> the first stage that fills it
    shared: dict[str, str] = {}
    for phase_key, phase in recipe.phases():
        name, folder = f"latents.{phase_key}", latents_folder(recipe, phase, digests)
        shared[name] = folders.setdefault(folder, name)
        if shared[name] == name:
            buckets = tuple(bucket_sides(phase.side_px, phase.aspect_ratios))
            fields = latents_fields(recipe, phase, digests)
            tasks = [
                ShardTask(number, shard.digest[:12], folder, shard.rows, LatentsSource(shard, buckets))
                for number, shard in raw_shards.items()
            ]
            stages[name] = ShardStage(name, "latents", folder, fields, {"raw": raw.digest}, tasks)
    worker = {
        "store_url": store.url,
        "towers": towers,
        "text": recipe.text,
        "dtypes": {"text": recipe.encode.text_dtype, "latents": recipe.encode.latent_dtype},
        "batch": recipe.encode.batch,
        "max_image_pixels": recipe.data.max_image_pixels,
        "threads": decode_threads(recipe.compute),
        "device": actor_device(recipe.compute),
    }
    made = run_shard_stages(store, recipe.run, list(stages.values()), EncodeWorker, worker, recipe.compute, report)
    results = {result.stage: result for result in made}
    for name, source in shared.items():
        if name != source:
            results[name] = dataclasses.replace(results[source], stage=name)
            stage = stages[source]
            remember_stage(store, recipe.run, name, stage.folder, results[name].manifest.digest, stage.fields)
    return results


def _text_stage(
    recipe: Recipe,
    digests: dict[str, str],
    raw: ManifestRef,
    raw_shards: dict[int, InputShard],
    captions: ManifestRef | None,
    caption_shards: dict[int, InputShard],
) -> ShardStage:
    folder, fields = text_folder(recipe, digests), text_fields(recipe, digests)
    tasks = []
    for number, shard in raw_shards.items():
        captioned = caption_shards.get(number)
        digest = content_digest(shard.digest, captioned.digest if captioned else "")
        tasks.append(ShardTask(number, digest, folder, shard.rows, TextSource(shard, captioned)))
    inputs = {"raw": raw.digest} | ({"captions": captions.digest} if captions else {})
    return ShardStage("text", "text", folder, fields, inputs, tasks, needs=(NULL,))


class EncodeWorker:
    """Text shards first, then latents, with only the encoders loaded that the task at hand needs."""

    def __init__(
        self,
        store_url: str,
        towers: ManifestRef,
        text: Text,
        dtypes: dict[str, str],
        batch: int,
        max_image_pixels: int,
        threads: int,
        device: str,
    ) -> None:
        store = open_store(store_url)
        self.make = {
            TextSource: lambda: TextWorker(store, towers, text, dtypes["text"], batch, device),
            LatentsSource: lambda: LatentsWorker(
                store, towers, dtypes["latents"], batch, max_image_pixels, threads, device
            ),
        }
        self.loaded_for: type | None = None
        self.worker: TextWorker | LatentsWorker | None = None

    def __call__(self, task: ShardTask) -> DoneRecord:
        wanted = type(task.source)
        if self.loaded_for is not wanted:
            self.worker = self.loaded_for = None  # the old encoders' memory goes before the new ones come
            self.worker = self.make[wanted]()
            self.loaded_for = wanted
        return self.worker(task)

    @property
    def progress(self) -> int | None:
        return getattr(self.worker, "progress", None)


class TextWorker:
    """Raw shard and its captions -> text tar: each distinct caption once, an index row for each (key, kind)."""

    def __init__(self, store: Store, towers: ManifestRef, text: Text, dtype: str, batch: int, device: str) -> None:
        from sd3core.text_encoders import load_text_encoders  # here, so that a latents worker does not import transformers

        self.store, self.text, self.batch = store, text, batch
        self.dtype = getattr(torch, dtype)
        local = fetch_towers(store, towers.folder, towers_cache(), ENCODERS, towers.digest)
        self.encoders = load_text_encoders(local, text, torch.float32, device)
        self.progress = 0  # rows, by the share of the shard's captions that is done

    def __call__(self, task: ShardTask) -> DoneRecord:
        self.progress = 0
        null = f"{task.folder}/{NULL}"
        if not self.store.exists(null):
            self.store.put(null, self._encode([""])[0].to_bytes(self.text.padding))
        failed: list[FailedRow] = []
        samples = self._samples(_distinct(self._captions(task.source)), task.rows, failed)
        return write_shard(self.store, task.folder, task.stem, samples, failed, TEXT_SCHEMA)

    def _captions(self, source: TextSource) -> Iterator[tuple[str, str, str]]:
        """(key, kind, caption) of every caption there is."""
        raw = read_input_index(self.store, source.raw)
        synthetic = {}
        if source.captions:
            table = read_input_table(self.store, source.captions)
            synthetic = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        for key, original in zip(raw["key"].to_pylist(), raw["caption"].to_pylist(), strict=True):
            if original:
                yield key, ORIGINAL, original
            if synthetic.get(key):
                yield key, SYNTHETIC, synthetic[key]

    def _samples(self, uses: dict[str, list[tuple[str, str]]], rows: int, failed: list[FailedRow]) -> Iterator[Sample]:
        offset = encoded = 0
        for captions in batched(uses, self.batch):
            for caption, features in zip(captions, self._encode(list(captions)), strict=True):
                if not _finite(features):
                    failed += [
                        FailedRow(key=key, reason=f"{kind} caption: its features are not finite in {self.dtype}")
                        for key, kind in uses[caption]
                    ]
                    continue
                data = features.to_bytes(self.text.padding)
                length = BLOCK * (1 + math.ceil(len(data) / BLOCK))  # one tar header and the padded bytes
                name = caption_id(caption)
                lengths = dict(zip((f"{name}_len" for name in ENCODERS), features.lengths[0].tolist(), strict=True))
                for position, (key, kind) in enumerate(uses[caption]):
                    row = {"key": key, "kind": kind, "caption_id": name, "offset": offset, "length": length, **lengths}
                    yield Sample(name, {"safetensors": data} if position == 0 else {}, row)
                offset += length
            encoded += len(captions)
            self.progress = rows * encoded // len(uses)

    def _encode(self, captions: list[str]) -> list[TextFeatures]:
        features = self.encoders.encode(captions).to("cpu").to(self.dtype)
        return [features.index(i) for i in range(len(captions))]


def caption_id(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:24]


def _distinct(captions: Iterable[tuple[str, str, str]]) -> dict[str, list[tuple[str, str]]]:
    """caption -> the (key, kind)s that have it, in order of first use."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for key, kind, caption in captions:
        uses.setdefault(caption, []).append((key, kind))
    return uses


def _finite(features: TextFeatures) -> bool:
    parts = (features.clip_l, features.clip_g, features.t5, features.clip_l_pooled, features.clip_g_pooled)
    return all(bool(torch.isfinite(part).all()) for part in parts)


@dataclass(frozen=True)
class Prepared:
    """A decoded and cropped image, or why there is none."""

    key: str
    bucket: Side | None = None
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    crop: Crop | None = None
    error: str | None = None


class LatentsWorker:
    """Raw shard -> latents tar, in batches of one bucket; threads decode ahead of the encoding."""

    def __init__(
        self, store: Store, towers: ManifestRef, dtype: str, batch: int, max_image_pixels: int, threads: int, device: str
    ) -> None:
        from sd3core.autoencoder import load_autoencoder  # here, so that a text worker does not import diffusers

        self.store, self.batch, self.threads = store, batch, threads
        self.max_image_pixels = max_image_pixels
        self.dtype = getattr(torch, dtype)
        local = fetch_towers(store, towers.folder, towers_cache(), ("vae",), towers.digest)
        self.autoencoder = load_autoencoder(local, torch.float32, device)
        self.progress = 0  # images

    def __call__(self, task: ShardTask) -> DoneRecord:
        self.progress = 0
        index = read_input_index(self.store, task.source.raw)
        splits = dict(zip(index["key"].to_pylist(), index["split"].to_pylist(), strict=True))
        failed: list[FailedRow] = []
        samples = self._samples(task.source, splits, failed)
        return write_shard(self.store, task.folder, task.stem, samples, failed, LATENTS_SCHEMA, count_by="bucket")

    def _samples(self, source: LatentsSource, splits: dict[str, str], failed: list[FailedRow]) -> Iterator[Sample]:
        waiting: dict[Side, list[Prepared]] = {}
        images = read_images(self.store, source.raw)
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
                yield from self._encoded(waiting.pop(item.bucket), splits, failed)
        for batch in waiting.values():
            yield from self._encoded(batch, splits, failed)

    def _prepare(self, key: str, data: bytes, buckets: tuple[Side, ...]) -> Prepared:
        try:
            image = decode_image(data, self.max_image_pixels)
        except UserError as error:
            return Prepared(key, error=str(error))
        bucket = nearest_bucket(image.width, image.height, buckets)
        pixels, crop = crop_to(image, *bucket)
        return Prepared(key, bucket, pixels, crop)

    def _encoded(self, batch: list[Prepared], splits: dict[str, str], failed: list[FailedRow]) -> Iterator[Sample]:
        images = to_model_range(np.stack([item.pixels for item in batch]))  # (B, 3, H, W)
        latents = self.autoencoder.encode(images).to("cpu", self.dtype)  # (B, 16, H/8, W/8)
        for item, latent in zip(batch, latents, strict=True):
            if not bool(torch.isfinite(latent).all()):
                failed.append(FailedRow(key=item.key, reason=f"its latent is not finite in {self.dtype}"))
                continue
            yield Sample(item.key, {"safetensors": save_tensors({"latent": latent.contiguous()})}, self._row(item, splits))
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


def batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
