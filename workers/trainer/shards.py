"""Opens the loader of a rank, in its own process or in one beside it."""

from __future__ import annotations

from sd3core.data.loader import BatchLoader
from sd3core.data.loader_process import LoaderProcess
from sd3core.data.loader_settings import LoaderSettings, open_loader
from sd3core.data.store import Store
from workers.caches import shards_cache
from workers.trainer.job import TrainingJob
from workers.trainer.loop import RankContext, Warn


def open_shards(job: TrainingJob, store: Store, place: RankContext, warn: Warn) -> BatchLoader | LoaderProcess:
    """Raises DataError where a manifest is missing, is another one than the job names, or the two do not line up."""
    settings = LoaderSettings(
        store=store,
        latents=job.latents,
        text=job.text_features,
        clip_tokens=job.text.clip_tokens,
        t5_tokens=job.text.t5_tokens,
        seed=job.seed,
        original_fraction=job.training.original_caption_fraction,
        global_batch=job.training.global_batch,
        micro_batch=job.training.micro_batch,
        steps=job.total_steps,
        rank=place.rank,
        world=place.world,
        cache_folder=shards_cache(),
        cache_bytes=place.cache_bytes,
        read_ahead_bytes=place.decoded_bytes,
    )
    if place.loader_process:
        loader = LoaderProcess(settings)
        warnings = loader.warnings
    else:
        loader, warnings = open_loader(settings)
    for warning in warnings:
        warn(warning)
    return loader
