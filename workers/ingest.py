"""The ingest stage: images into raw WebDataset shards, a part held out.

Sizes and captions stand beside them. The driver holds a folder's names, sizes and times; its files are opened by the workers, and
those that stand unchanged by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sd3core.data.folder_source import Tell, storable
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.image_files.listed_table import ListedTable, list_files
from sd3core.data.images import BARE_CMYK, TRANSPARENT, UNKNOWN_COLOURS
from sd3core.data.ingest import SceneShard, SceneWorker, list_scenes
from sd3core.data.ingest_folder import (
    FURTHER_ROWS,
    HELD_OUT_ROWS,
    FolderWorker,
    IngestedSlice,
    check_usable,
    no_usable_image,
)
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.seen_files import SeenFolder, read_seen_folder, write_seen_folder
from sd3core.data.shards import finished_stems, shard_stem
from sd3core.data.slices import earlier_slices
from sd3core.data.store import Store
from sd3core.progress import ProgressCallback
from sd3core.recipe import UNIT_SOURCES, Data, Recipe
from sd3core.specs import raw_fields, raw_folder
from sd3core.words import counted
from workers.ingest_units import ingest_units, named_urls
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage
from workers.stage import StageResult


def ingest_stage(recipe: Recipe, store: Store, report: ProgressCallback, tell: Tell = lambda note: None) -> StageResult:
    """Rejected images are counted by reason in the result's warnings with the first names; the done records have all.

    What is odd about a folder's captions is among them; what shows in names alone is told before any shard is made.
    """
    if recipe.data.source == "small_world":
        folder = raw_folder(recipe)
        tasks = [
            ShardTask(shard.number, shard.digest, folder, rows=len(shard.scenes), source=shard)
            for shard in list_scenes(recipe.data, recipe.seed)
        ]
        return _made(recipe, store, report, _stage(recipe, tasks))
    if recipe.data.source in UNIT_SOURCES:
        result, notes = ingest_units(recipe, store, report, tell)
        return _with_notes(recipe, store, result, notes, named_urls(recipe.data))
    return _FolderIngest(recipe, store).run(report, tell)


def _stage(recipe: Recipe, tasks: list[ShardTask]) -> ShardStage:
    return ShardStage("ingest", "raw", raw_folder(recipe), raw_fields(recipe), {}, tasks, unit="image")


def _made(recipe: Recipe, store: Store, report: ProgressCallback, stage: ShardStage) -> StageResult:
    worker = {
        "data": recipe.data,
        "store_url": store.url,
        "folder": stage.folder,
        "captions_needed": recipe.caption.captioner == "none",
    }
    return run_shard_stage(store, recipe.run, stage, IngestShard, worker, recipe.compute.for_stage("ingest"), report)


def _with_notes(recipe: Recipe, store: Store, result: StageResult, notes: list[str], named: str) -> StageResult:
    """The result of a user's own images. DataError, with how their source is `named`, where none of them can be used."""
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    if not manifest.rows:
        raise no_usable_image(named, manifest.failed_reasons, notes)
    reason = result.reason if result.skipped else f"{result.reason}; {_images_used(manifest)}"
    told = [*notes, *_notes_of_pictures(manifest, recipe.data)]
    return replace(result, reason=reason, warnings=[*result.warnings, *told])


class _FolderIngest:
    """One run of the stage over files of a folder, or of a table's rows."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe, self.data, self.store = recipe, recipe.data, store
        self.folder = raw_folder(recipe)
        self.captions_needed = recipe.caption.captioner == "none"
        self.answers: dict[int, IngestedSlice] = {}  # by number, of slices that were looked at

    def run(self, report: ProgressCallback, tell: Tell) -> StageResult:
        source = list_files(self.data)
        seen = read_seen_folder(self.store, self.folder, source.place)
        if seen is not None and seen.listing == source.digest and self._stands(seen):
            tasks = [ShardTask(n, part.digest, self.folder, part.rows) for n, part in seen.slices.items()]
            result, notes = _made(self.recipe, self.store, report, _stage(self.recipe, tasks)), seen.notes
        else:
            result, notes = self._look_at(source, seen, report, tell)
        return _with_notes(self.recipe, self.store, result, notes, source.named)

    def _stands(self, seen: SeenFolder) -> bool:
        finished = finished_stems(self.store, self.folder)
        return all(shard_stem(number, part.digest) in finished for number, part in seen.slices.items())

    def _look_at(
        self, source: ListedFolder | ListedTable, seen: SeenFolder | None, report: ProgressCallback, tell: Tell
    ) -> tuple[StageResult, list[str]]:
        """Has those slices looked at of which a name, size or time is another; the result, and what is told of captions."""
        notes = [storable(note) for note in source.notes()]
        for note in notes:
            tell(note)
        slices = source.slices()
        if seen is None:
            check_usable(source, slices, self.captions_needed)
        known = seen.slices if seen is not None else {}
        unchanged = {part.number for part in slices if part.number in known and known[part.number].seen == part.seen}
        before = earlier_slices(
            [part.number for part in slices if part.number not in unchanged], known, [part.number for part in slices]
        )
        tasks = [
            ShardTask(
                part.number,
                known[part.number].digest if part.number in unchanged else "",
                self.folder,
                part.rows,
                replace(part, before=tuple(shard_stem(n, known[n].digest) for n in before.get(part.number, ()))),
            )
            for part in slices
        ]

        def changes(answers: Sequence[MadeShard]) -> str:
            self.answers = {answer.record.number: answer.detail for answer in answers}
            return _changes(seen, list(self.answers.values()), tasks) if seen is not None else ""

        result = _made(self.recipe, self.store, report, replace(_stage(self.recipe, tasks), changes=changes))
        now = {
            part.number: self.answers[part.number].seen if part.number in self.answers else known[part.number]
            for part in slices
        }
        facts = (part.facts for part in now.values())
        notes += map(storable, source.caption_notes(facts, self.captions_needed))
        digest = source.digest if source.at_rest and all(part.seen for part in now.values()) else ""
        write_seen_folder(self.store, self.folder, source.place, SeenFolder(digest, now, notes))
        return result, notes


def _changes(seen: SeenFolder, answers: list[IngestedSlice], tasks: list[ShardTask]) -> str:
    """Says what changed since the folder was last ingested: "1 caption changed, 1 image added, 1 removed: 2 of 33 shards"."""
    captions, added, images = (
        sum(getattr(answer.changes, name) for answer in answers) for name in ("captions", "added", "images")
    )
    removed = seen.rows + added - sum(task.rows for task in tasks)
    parts = [f"{counted(captions, 'caption')} changed"] if captions else []
    of_images = [(images, "changed"), (added, "added"), (max(removed, 0), "removed")]
    for place, (count, what) in enumerate([part for part in of_images if part[0]]):
        parts.append(f"{count:,} {what}" if place else f"{counted(count, 'image')} {what}")
    made = sum(not answer.stood for answer in answers)
    return f"{', '.join(parts)}: {made:,} of {counted(len(tasks), 'shard')}" if parts else ""


def _images_used(manifest: Manifest) -> str:
    """Says how many of a user's own images there are to train and to score on."""
    found = manifest.rows + sum(manifest.failed_reasons.values())
    held_out, further = manifest.buckets.get(HELD_OUT_ROWS, 0), manifest.buckets.get(FURTHER_ROWS, 0)
    joined = f", {counted(further, 'more row')} with captions of theirs" if further else ""
    return f"{manifest.rows:,} of {counted(found, 'image')} used, {held_out:,} held out{joined}"


def _notes_of_pictures(manifest: Manifest, data: Data) -> list[str]:
    """What became of transparency and of colours that are not known, by the counts that the shards hold."""
    counts = manifest.buckets
    words = {
        TRANSPARENT: f"{data.background} lies under those parts (data.background)",
        UNKNOWN_COLOURS: "damaged, of another colour space or of HDR; taken as sRGB",
        BARE_CMYK: "the colours are a guess; save such images as RGB",
    }
    return [f"{counted(counts[note], 'image')}: {note}: {said}" for note, said in words.items() if note in counts]


@dataclass
class IngestShard:
    """Makes a raw shard of a ShardTask: of scenes, or of a folder's or table's slice."""

    data: Data
    store_url: str
    folder: str
    captions_needed: bool

    def __post_init__(self) -> None:
        self.scenes = SceneWorker(self.data, self.store_url, self.folder)
        self.files = FolderWorker(self.data, self.store_url, self.folder, self.captions_needed)

    def __call__(self, task: ShardTask) -> MadeShard:
        self.scenes.progress = 0
        if isinstance(task.source, SceneShard):
            return MadeShard(self.scenes(task.source))
        made = self.files(task.source, task.earlier)
        return MadeShard(made.record, told=made.told, stood=made.stood, detail=made)

    @property
    def progress(self) -> int:
        return self.scenes.progress + self.files.progress
