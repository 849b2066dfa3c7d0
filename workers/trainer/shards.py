"""Opens the loader of a rank: two manifests, the plan, a local cache of shards."""

from __future__ import annotations

from sd3core.data.loader import BatchLoader
from sd3core.data.manifest import read_manifest
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.store import Store
from sd3core.data.training_plan import TrainingPlan
from sd3core.data.uncaptioned import read_uncaptioned, shards_without_captions
from sd3core.data.unit_counts import leave_out_small_buckets, small_buckets_warning
from workers.caches import shards_cache
from workers.trainer.job import TrainingJob
from workers.trainer.loop import RankContext, Warn


def open_shards(job: TrainingJob, store: Store, place: RankContext, warn: Warn) -> BatchLoader:
    """Raises DataError where a manifest is missing, is another one than the job names, or the two do not line up."""
    latents = read_manifest(store, job.latents.folder, job.latents.digest)
    text = read_manifest(store, job.text_features.folder, job.text_features.digest)
    cache = ShardCache(store, shards_cache(), place.cache_bytes)
    tokens = {"clip_tokens": job.text.clip_tokens, "t5_tokens": job.text.t5_tokens}
    reader = ShardReader(store, latents, text, cache, **tokens)
    uncaptioned = {}
    if shards_without_captions(text):
        uncaptioned = read_uncaptioned(store, job.latents, job.text_features)
    counts, without_caption = reader.counts("train", uncaptioned)
    if without_caption:
        warn(f"{without_caption} images have no caption and are left out of training")
    if warning := small_buckets_warning(counts, job.training.global_batch):
        warn(warning)
    counts = leave_out_small_buckets(counts, job.training.global_batch)
    plan = TrainingPlan(counts, job.seed, job.training.global_batch)
    return BatchLoader(
        reader,
        plan,
        original_fraction=job.training.original_caption_fraction,
        seed=job.seed,
        rank=place.rank,
        world=place.world,
        micro_batch=job.training.micro_batch,
        steps=job.total_steps,
        read_ahead_bytes=place.decoded_bytes,
    )
