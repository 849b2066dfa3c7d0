"""Ingest: the recipe's images into raw WebDataset shards with sizes and captions, a held-out part marked."""

from __future__ import annotations

from sd3core.data.ingest import IngestWorker, list_source
from sd3core.data.shards import DoneRecord
from sd3core.data.store import Store
from sd3core.progress import ProgressCallback
from sd3core.recipe import Recipe
from sd3core.specs import raw_fields, raw_folder
from workers.shard_stage import ShardStage, ShardTask, StageResult, run_shard_stage


def ingest_stage(recipe: Recipe, store: Store, report: ProgressCallback) -> StageResult:
    """Rejected images are counted by reason in the result's warnings, and named in the shards' done records."""
    folder = raw_folder(recipe)
    tasks = [
        ShardTask(source.number, source.digest, folder, rows=len(source.items), source=source)
        for source in list_source(recipe.data, recipe.seed, captions_needed=recipe.caption.captioner == "none")
    ]
    stage = ShardStage("ingest", "raw", folder, raw_fields(recipe), {}, tasks)
    worker = {"data": recipe.data, "store_url": store.url, "folder": folder}
    return run_shard_stage(store, recipe.run, stage, IngestShard, worker, recipe.compute, report)


class IngestShard:
    """An IngestWorker that is called with a ShardTask."""

    def __init__(self, **settings) -> None:
        self.worker = IngestWorker(**settings)

    def __call__(self, task: ShardTask) -> DoneRecord:
        self.worker.progress = 0
        return self.worker(task.source)

    @property
    def progress(self) -> int:
        return self.worker.progress
