"""The filter stage: which rows of the raw data are kept, and why the others go.

No bytes are moved. Images are measured shard by shard (a hash or embedding, scores), near-duplicates are found over all of them, and each shard's keep-
list is written. Measures have a spec of their own: another threshold looks at no image again.
"""

from __future__ import annotations

import dataclasses

from sd3core.data.begun import begin
from sd3core.data.images import PixelRules
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.shards import parts_digest
from sd3core.data.store import Store
from sd3core.errors import DataError
from sd3core.filters.duplicate_lists import DuplicateLists, read_duplicates
from sd3core.progress import Progress, ProgressCallback
from sd3core.recipe import Recipe
from sd3core.specs import (
    DUPLICATES,
    fingerprint,
    keep_fields,
    keep_folder,
    measured_by,
    measures_fields,
    measures_folder,
)
from sd3core.words import counted
from workers.filter_keep import DuplicatesTask, DuplicatesWorker, KeepSource, KeepWorker
from workers.filter_measures import MeasureWorker
from workers.inputs import InputShard, actor_device, decode_threads, input_shards
from workers.pool import PoolSettings, map_over_actors
from workers.ray_session import start_ray
from workers.shard_stage import ShardStage, ShardTask, run_shard_stage
from workers.stage import StageFailed, StageResult, join_results

NO_FILTER = "the recipe names no filter"


def filter_stage(recipe: Recipe, store: Store, raw: ManifestRef, report: ProgressCallback) -> StageResult:
    """Its parts are "measures", where images are looked at, and "keep". DataError where no image to train on is left."""
    if recipe.filter is None:
        return StageResult("filter", raw.path, raw.digest, skipped=True, reason=NO_FILTER)
    shards = input_shards(read_manifest(store, raw.folder, raw.digest))
    # what the search finds is written before the lists
    begin(store, recipe.run, "filter", keep_folder(recipe), keep_fields(recipe))
    parts: dict[str, StageResult] = {}
    measures: dict[int, InputShard] = {}
    lists = DuplicateLists({}, {})
    if recipe.filter.measures:
        parts["measures"] = _measure(recipe, store, raw, shards, report)
        made = parts["measures"].manifest
        measures = input_shards(read_manifest(store, made.folder, made.digest))
        if recipe.filter.duplicates is not None:
            lists = _duplicates(recipe, store, raw, made, report)
    parts["keep"] = keep = _keep(recipe, store, raw, shards, measures, parts.get("measures"), lists, report)
    _check_rows(read_manifest(store, keep.folder, keep.digest))
    reason = "; ".join(sorted({part.reason for part in parts.values()}))
    return dataclasses.replace(join_results("filter", parts, keep.digest, reason), rows=keep.rows)


def _measure(
    recipe: Recipe, store: Store, raw: ManifestRef, shards: dict[int, InputShard], report: ProgressCallback
) -> StageResult:
    folder, made_by = measures_folder(recipe), measured_by(recipe.filter)
    tasks = [ShardTask(number, shard.digest[:12], folder, shard.rows, shard) for number, shard in shards.items()]
    inputs = {"raw": raw.digest}
    stage = ShardStage("measures", "measures", folder, measures_fields(recipe), inputs, tasks, unit="image")
    compute = recipe.compute.for_stage("filter")
    if not recipe.filter.has_models:
        compute = compute.model_copy(update={"gpus_per_actor": 0.0})
    worker = {
        "store_url": store.url,
        "rules": recipe.filter,
        "made_by": made_by,
        "pixels": PixelRules.of(recipe.data),
        "threads": decode_threads(compute),
        "most_bytes": compute.decoded_gb * 1e9,
        "device": actor_device(compute),
    }
    return run_shard_stage(store, recipe.run, stage, MeasureWorker, worker, compute, report)


def _duplicates(
    recipe: Recipe, store: Store, raw: ManifestRef, measures: ManifestRef, report: ProgressCallback
) -> DuplicateLists:
    """Found once for these images, measures and thresholds: their record stands beside the keep-lists."""
    record = f"{keep_folder(recipe)}/{DUPLICATES}{fingerprint([raw.digest, measures.digest])}.json"
    standing = read_duplicates(store, record)
    if standing is not None:
        return standing
    compute = recipe.compute.for_stage("filter")
    worker = {"store_url": store.url, "rules": recipe.filter, "seed": recipe.seed}

    def watch(task: DuplicatesTask, progress: Progress | None) -> None:
        if progress is not None:
            report(progress)

    with start_ray(compute):
        settings = PoolSettings.of(compute, actors=1, gpus_per_actor=0.0)
        (outcome,) = map_over_actors(
            DuplicatesWorker, worker, [DuplicatesTask(raw, measures, record)], settings, None, watch
        )
    if outcome.error is not None:
        raise StageFailed(
            f"filter: near-duplicates could not be looked for: {outcome.error}; put that right and run it again"
        )
    return read_duplicates(store, record)


def _keep(
    recipe: Recipe,
    store: Store,
    raw: ManifestRef,
    shards: dict[int, InputShard],
    measures: dict[int, InputShard],
    measured: StageResult | None,
    lists: DuplicateLists,
    report: ProgressCallback,
) -> StageResult:
    folder, tasks = keep_folder(recipe), []
    for number, shard in shards.items():
        of_shard = measures.get(number)
        digest = parts_digest(shard.digest, of_shard.digest if of_shard else "", lists.digests.get(number, ""))
        source = KeepSource(shard, of_shard, lists.parts.get(number))
        tasks.append(ShardTask(number, digest, folder, shard.rows, source))
    inputs = {"raw": raw.digest} | ({"measures": measured.digest} if measured else {})
    stage = ShardStage("filter", "keep", folder, keep_fields(recipe), inputs, tasks, unit="image")
    compute = recipe.compute.for_stage("filter").model_copy(update={"gpus_per_actor": 0.0})
    worker = {"store_url": store.url, "rules": recipe.filter}
    return run_shard_stage(store, recipe.run, stage, KeepWorker, worker, compute, report)


def _check_rows(keep: Manifest) -> None:
    if keep.rows:
        return
    reasons = sorted(keep.failed_reasons.items(), key=lambda item: -item[1])
    most = ", ".join(f"{reason}: {count:,}" for reason, count in reasons[:3])
    raise DataError(
        f"filter: none of {counted(sum(keep.failed_reasons.values()), 'image')} is kept ({most}); loosen those rules"
    )
