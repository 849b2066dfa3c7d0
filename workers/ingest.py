"""The ingest stage: images into raw WebDataset shards, a part held out.

Sizes and captions stand beside them.
"""

from __future__ import annotations

from dataclasses import replace

from sd3core.data.folder_source import Tell
from sd3core.data.images import BARE_CMYK, TRANSPARENT, UNKNOWN_COLOURS
from sd3core.data.ingest import HELD_OUT_ROWS, IngestWorker, list_source
from sd3core.data.manifest import read_manifest
from sd3core.data.store import Store
from sd3core.progress import ProgressCallback
from sd3core.recipe import Data, Recipe
from sd3core.specs import raw_fields, raw_folder
from sd3core.words import counted
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage
from workers.stage import StageResult


def ingest_stage(recipe: Recipe, store: Store, report: ProgressCallback, tell: Tell = lambda note: None) -> StageResult:
    """Rejected images are counted by reason in the result's warnings with the first names; the done records have all.

    What is odd about a folder's captions is among them, and told before any shard is made.
    """
    folder = raw_folder(recipe)
    notes: list[str] = []
    sources = list_source(recipe.data, recipe.seed, recipe.caption.captioner == "none", notes.append)
    for note in notes:
        tell(note)
    tasks = [
        ShardTask(source.number, source.digest, folder, rows=len(source.items), source=source) for source in sources
    ]
    stage = ShardStage("ingest", "raw", folder, raw_fields(recipe), {}, tasks, unit="image")
    worker = {"data": recipe.data, "store_url": store.url, "folder": folder}
    result = run_shard_stage(store, recipe.run, stage, IngestShard, worker, recipe.compute, report)
    reason = result.reason if result.skipped else "; ".join([result.reason, *_images_used(store, recipe.data, result)])
    told = [*notes, *_notes_of_pictures(store, recipe.data, result)]
    return replace(result, reason=reason, warnings=[*result.warnings, *told])


def _images_used(store: Store, data: Data, result: StageResult) -> list[str]:
    """Says how many of a user's own images there are to train and to score on."""
    if data.source != "folder":
        return []
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    found = manifest.rows + sum(manifest.failed_reasons.values())
    held_out = manifest.buckets.get(HELD_OUT_ROWS, 0)
    return [f"{manifest.rows:,} of {counted(found, 'image')} used, {held_out:,} held out"]


def _notes_of_pictures(store: Store, data: Data, result: StageResult) -> list[str]:
    """What became of transparency and of colours that are not known, by the counts that the shards hold."""
    counts = read_manifest(store, result.manifest.folder, result.manifest.digest).buckets
    words = {
        TRANSPARENT: f"{data.background} lies under those parts (data.background)",
        UNKNOWN_COLOURS: "damaged, of another colour space or of HDR; taken as sRGB",
        BARE_CMYK: "the colours are a guess; save such images as RGB",
    }
    return [f"{counted(counts[note], 'image')}: {note}: {said}" for note, said in words.items() if note in counts]


class IngestShard:
    """An IngestWorker that is called with a ShardTask."""

    def __init__(self, **settings) -> None:
        self.worker = IngestWorker(**settings)

    def __call__(self, task: ShardTask) -> MadeShard:
        self.worker.progress = 0
        return MadeShard(self.worker(task.source))

    @property
    def progress(self) -> int:
        return self.worker.progress
