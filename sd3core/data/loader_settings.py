"""What a rank's loader is opened from, and opening it: manifests, plan, cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sd3core.data.batch_bytes import BatchBuffer, PlainBuffer
from sd3core.data.loader import BatchLoader
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.store import Store
from sd3core.data.training_plan import TrainingPlan
from sd3core.data.uncaptioned import read_uncaptioned, shards_without_captions
from sd3core.data.unit_counts import leave_out_small_buckets, small_buckets_warning


@dataclass(frozen=True)
class LoaderSettings:
    """All that a process needs to open a loader; pickles."""

    store: Store
    latents: ManifestRef
    text: ManifestRef
    clip_tokens: int
    t5_tokens: int
    seed: int
    original_fraction: float
    global_batch: int
    micro_batch: int
    steps: int
    rank: int
    world: int
    cache_folder: Path
    cache_bytes: float
    read_ahead_bytes: float


def open_loader(
    settings: LoaderSettings, allocate: Callable[[int], BatchBuffer] = PlainBuffer
) -> tuple[BatchLoader, list[str]]:
    """The loader, and what its user should hear. `allocate`: bytes -> a buffer for a batch.

    Raises DataError where a manifest is missing, is another one than is asked for, or the two do not line up.
    """
    store, warnings = settings.store, []
    latents = read_manifest(store, settings.latents.folder, settings.latents.digest)
    text = read_manifest(store, settings.text.folder, settings.text.digest)
    cache = ShardCache(store, settings.cache_folder, settings.cache_bytes)
    tokens = {"clip_tokens": settings.clip_tokens, "t5_tokens": settings.t5_tokens}
    reader = ShardReader(store, latents, text, cache, **tokens, allocate=allocate)
    uncaptioned = {}
    if shards_without_captions(text):
        uncaptioned = read_uncaptioned(store, settings.latents, settings.text)
    counts, without_caption = reader.counts("train", uncaptioned)
    if without_caption:
        warnings.append(f"{without_caption} images have no caption and are left out of training")
    if warning := small_buckets_warning(counts, settings.global_batch):
        warnings.append(warning)
    counts = leave_out_small_buckets(counts, settings.global_batch)
    loader = BatchLoader(
        reader,
        TrainingPlan(counts, settings.seed, settings.global_batch),
        original_fraction=settings.original_fraction,
        seed=settings.seed,
        rank=settings.rank,
        world=settings.world,
        micro_batch=settings.micro_batch,
        steps=settings.steps,
        read_ahead_bytes=settings.read_ahead_bytes,
    )
    return loader, warnings
