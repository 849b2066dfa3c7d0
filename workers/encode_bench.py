"""Measures how fast actors encode: several shards at once, and two actors.

Scenes of the drawn world, of the last phase's size, are encoded by the real actors with a recipe's own towers, into its store; all
but the towers is removed at the end. What counts is the time in which all actors are at work: no loading is in it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sd3core.data.ingest import DESCRIBE, SceneWorker, list_scenes
from sd3core.data.manifest import ManifestRef
from sd3core.data.size_rule import SizeRule
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.recipe import ENCODERS, Data, Recipe
from sd3core.specs import INDEX
from sd3core.towers.artifact import fetch_towers
from workers.at_once import SHARDS_AT_ONCE
from workers.caches import towers_cache
from workers.encode import EncodeWorker, encoding_settings
from workers.encode_latents import LatentsSource
from workers.encode_text import TextSource
from workers.inputs import InputShard
from workers.pool import PoolSettings, map_over_actors
from workers.ray_session import start_ray
from workers.shard_stage import ShardTask

if TYPE_CHECKING:
    from sd3core.towers.precision_difference import PrecisionDifference

COMPARED = 32  # scenes
WAYS = {
    "one by one": (1, 1),
    "at once": (1, SHARDS_AT_ONCE),
    "two actors": (2, SHARDS_AT_ONCE),
}  # actors, shards of each
KINDS = ("text", "latents")


@dataclass(frozen=True)
class EncodeBench:
    """What is measured."""

    shards: int = 16  # of one actor; two have twice as many
    rows: int = 64  # of a shard
    rounds: int = 3


@dataclass(frozen=True)
class EncodeRates:
    """Shards a second, by round: of one kind of work, by way."""

    kind: str
    rates: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def rate(self, way: str) -> float:
        return statistics.median(self.rates[way])

    @property
    def gain(self) -> float:
        """How many times as fast an actor is that is at several shards at once."""
        return self._ratio("at once", "one by one")

    @property
    def two_actors(self) -> float:
        return self._ratio("two actors", "at once")

    def _ratio(self, fast: str, slow: str) -> float:
        return statistics.median(a / b for a, b in zip(self.rates[fast], self.rates[slow], strict=True))


@dataclass(frozen=True)
class ShardTime:
    """When a worker was at a shard, seconds of the machine's clock."""

    process: int
    began: float
    ended: float


class TimedEncodeWorker(EncodeWorker):
    """Says when it was at a shard."""

    tasks_at_once = 1

    def __call__(self, task: ShardTask) -> ShardTime:
        with self.gate:
            self._loaded(type(task.source))
        began = time.time()
        super().__call__(task)
        return ShardTime(os.getpid(), began, time.time())


class TimedAtOnceWorker(TimedEncodeWorker):
    """Likewise, as actors work in the encode stage."""

    tasks_at_once = SHARDS_AT_ONCE


def measure_encoding(
    settings: EncodeBench,
    recipe: Recipe,
    store: Store,
    towers: ManifestRef,
    on_round: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = print,
) -> list[EncodeRates]:
    """Encodes the same shards in every way, in turn, `rounds` times. UserError where a shard could not be made."""
    folder = f"bench-encode-{uuid.uuid4().hex[:12]}"
    found = [EncodeRates(kind) for kind in KINDS]
    with _removed_at_the_end(store, folder), start_ray(recipe.compute):
        say(f"drawing {2 * settings.shards} shards of {settings.rows} scenes below {store.uri(folder)}")
        sources = _sources(settings, recipe, _drawn(settings, recipe, store, f"{folder}/raw"))
        for number in range(settings.rounds):
            for rates in found:
                for way in WAYS:
                    shards = sources[rates.kind][: WAYS[way][0] * settings.shards]
                    output = f"{folder}/{number}/{rates.kind}/{way.replace(' ', '-')}"
                    rates.rates[way].append(_rate(recipe, store, towers, way, output, shards))
                    _remove(store, output)
            on_round(number + 1)
    return found


def _drawn(settings: EncodeBench, recipe: Recipe, store: Store, folder: str) -> list[InputShard]:
    """Raw shards of scenes of the last phase's size, as many as two actors take."""
    side = recipe.phases()[-1][1].side_px
    images = 2 * settings.shards * settings.rows
    data = Data(name="bench", source="small_world", images=images, image_side_px=side, rows_per_shard=settings.rows)
    draw = SceneWorker(data, store.url, folder)
    records = [draw(shard) for shard in list_scenes(data, seed=0)]
    return [InputShard(folder, r.stem, r.digest, r.rows, r.files[INDEX], r.bytes) for r in records]


def _sources(settings: EncodeBench, recipe: Recipe, raw: Sequence[InputShard]) -> dict[str, list[Any]]:
    side = recipe.phases()[-1][1].side_px
    return {
        "text": [TextSource(shard, None) for shard in raw],
        "latents": [LatentsSource(shard, SizeRule(((side, side),))) for shard in raw],
    }


def _rate(
    recipe: Recipe,
    store: Store,
    towers: ManifestRef,
    way: str,
    folder: str,
    sources: Sequence[TextSource | LatentsSource],
) -> float:
    """Shards a second of these actors, over the time in which all of them are at work."""
    actors, at_once = WAYS[way]
    compute = recipe.compute.for_stage("encode")
    worker = encoding_settings(recipe, store, towers)
    tasks = [
        ShardTask(number, source.raw.digest[:12], folder, source.raw.rows, source)
        for number, source in enumerate(sources)
    ]
    worker_class = TimedEncodeWorker if at_once == 1 else TimedAtOnceWorker
    outcomes = map_over_actors(worker_class, worker, tasks, PoolSettings.of(compute, actors=actors))
    if failed := [outcome for outcome in outcomes if outcome.error is not None]:
        raise UserError(
            f"{store.uri(folder)}: {len(failed)} of {len(tasks)} shards could not be made: {failed[0].error}"
        )
    return rate_while_all_work([outcome.result for outcome in outcomes], actors)


def rate_while_all_work(times: Sequence[ShardTime], actors: int) -> float:
    """Shards a second from the moment at which the last process has begun to the one at which the first has ended; a shard that is
    partly within that time counts with that part. NaN where so many actors were never at work together.
    """
    processes = {time.process for time in times}
    began = max(min(time.began for time in times if time.process == process) for process in processes)
    ended = min(max(time.ended for time in times if time.process == process) for process in processes)
    if len(processes) < actors or ended <= began:
        return math.nan
    within = sum(
        max(0.0, min(time.ended, ended) - max(time.began, began)) / (time.ended - time.began) for time in times
    )
    return within / (ended - began)


@contextmanager
def _removed_at_the_end(store: Store, folder: str) -> Iterator[None]:
    try:
        yield
    finally:
        _remove(store, folder)


def _remove(store: Store, folder: str) -> None:
    for entry in store.list(folder):
        store.delete(entry.path)


def measure_differences(recipe: Recipe, store: Store, towers: ManifestRef) -> dict[str, PrecisionDifference]:
    """What the recipe's encoders give in bf16 beside what they give in fp32, on scenes of the last phase's size."""
    import numpy as np
    import torch

    from sd3core.data.images import to_model_range
    from sd3core.small_world.scenes import describe, draw_scene, render, scene_rng
    from sd3core.towers.precision_difference import latent_difference, text_differences

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = recipe.phases()[-1][1].side_px
    scenes = [draw_scene(0, index, side, 1.0, recipe.data.max_objects) for index in range(COMPARED)]
    captions = [describe(scene, scene_rng(0, index, DESCRIBE)) for index, scene in enumerate(scenes)]
    images = to_model_range(np.stack([render(scene) for scene in scenes]))
    local = fetch_towers(store, towers.folder, towers_cache(), (*ENCODERS, "vae"), towers.digest)
    found = text_differences(local, recipe.text, captions, device)
    return found | {"latents": latent_difference(local, images, device)}
