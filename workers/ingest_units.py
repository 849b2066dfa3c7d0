"""Ingest of tars and parquet files: the driver holds names, sizes and ETags.

A task is a file that is new or another one since it was last read: whoever has it makes all of its shards. The others' shards
are known from the source's record, and nobody opens them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from sd3core.data.folder_source import Tell, storable
from sd3core.data.images import DecodedImage
from sd3core.data.ingest_folder import LOOKED_AT, no_usable_image, stored_picture
from sd3core.data.shards import finished_stems
from sd3core.data.sources.ingest_unit import IngestedUnit, UnitWorker, open_rows
from sd3core.data.sources.listing import SourceListing, SourceUnit, list_source
from sd3core.data.sources.rows import RowNote, RowRules, SourceRow
from sd3core.data.sources.seen_units import NoteFacts, SeenUnit, read_seen_source, write_seen_source
from sd3core.data.store import Store, StoreDenied, StoreNotFound, open_store
from sd3core.errors import DataError
from sd3core.progress import ProgressCallback
from sd3core.recipe import Data, Recipe
from sd3core.specs import raw_fields, raw_folder
from sd3core.words import NAMED, counted, some
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage
from workers.stage import StageResult

FILES_LOOKED_AT = 3  # at most, for one image that can be used, before workers start
THINGS = {"webdataset": "tar", "parquet": "parquet file"}  # what a source's files are called


def ingest_units(
    recipe: Recipe, store: Store, report: ProgressCallback, tell: Tell = lambda note: None
) -> tuple[StageResult, list[str]]:
    """The stage's result, and what is told of files and captions."""
    return _UnitsIngest(recipe, store).run(report, tell)


class _UnitsIngest:
    """One run of the stage over a source of files that hold many images."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe, self.data, self.store = recipe, recipe.data, store
        self.folder = raw_folder(recipe)
        self.captions_needed = recipe.caption.captioner == "none"
        self.answers: dict[int, IngestedUnit] = {}  # by the file's number, of those that were looked at

    def run(self, report: ProgressCallback, tell: Tell) -> tuple[StageResult, list[str]]:
        listing = list_source(self.data)
        for note in listing.notes:
            tell(note)
        seen = read_seen_source(self.store, self.folder)
        if seen is None:
            check_source(RowRules(self.data, self.captions_needed), listing)
        known = seen or {}
        unchanged = self._unchanged(listing, known)
        tasks = [task for unit in listing.units for task in self._tasks(unit, unchanged.get(unit.number))]

        def changes(answers: Sequence[MadeShard]) -> str:
            self.answers = {answer.record.number: answer.detail for answer in answers}
            return self._changes(listing, known) if seen is not None else ""

        stage = ShardStage(
            "ingest",
            "raw",
            self.folder,
            raw_fields(self.recipe),
            {},
            tasks,
            unit="image",
            changes=changes,
            counted_in="MB",
            task_name=THINGS[self.data.source],
        )
        worker = {
            "data": self.data,
            "store_url": self.store.url,
            "folder": self.folder,
            "captions_needed": self.captions_needed,
        }
        compute = self.recipe.compute.for_stage("ingest")
        result = run_shard_stage(self.store, self.recipe.run, stage, IngestUnit, worker, compute, report)
        now = unchanged | {number: answer.seen for number, answer in self.answers.items()}
        notes = [*listing.notes, *_notes(self.data, (unit.facts for unit in now.values()))]
        write_seen_source(self.store, self.folder, now)
        return result, notes

    def _unchanged(self, listing: SourceListing, known: dict[int, SeenUnit]) -> dict[int, SeenUnit]:
        """By number: the files that are as they were, whose shards all stand."""
        finished = finished_stems(self.store, self.folder) if known else {}
        return {
            unit.number: known[unit.number]
            for unit in listing.units
            if unit.number in known
            and known[unit.number].version == unit.version
            and finished.keys() >= set(known[unit.number].stems(unit.number))
        }

    def _tasks(self, unit: SourceUnit, seen: SeenUnit | None) -> list[ShardTask]:
        """One of a file that is to be read, or one for each of its shards."""
        if seen is None:
            return [ShardTask(unit.number, "", self.folder, unit.megabytes, unit, called=storable(unit.name))]
        sizes = [unit.megabytes] + [0] * len(seen.digests)
        return [
            ShardTask(unit.number + part, digest, self.folder, sizes[part]) for part, digest in enumerate(seen.digests)
        ]

    def _changes(self, listing: SourceListing, known: dict[int, SeenUnit]) -> str:
        """Says what changed since the source was last ingested: "1 tar added, 1 changed: 2 of 125 shards"."""
        numbers = {unit.number for unit in listing.units}
        counts = {
            "added": len(self.answers.keys() - known.keys()),
            "changed": sum(
                number in known and answer.seen.digests != known[number].digests
                for number, answer in self.answers.items()
            ),
            "removed": len(known.keys() - numbers),
        }
        thing = THINGS[self.data.source]
        parts = [(count, what) for what, count in counts.items() if count]
        told = [f"{counted(count, thing) if not place else count} {what}" for place, (count, what) in enumerate(parts)]
        made = sum(not shard.stood for answer in self.answers.values() for shard in answer.shards)
        standing = sum(len(unit.digests) for number, unit in known.items() if number in numbers - self.answers.keys())
        total = standing + sum(len(answer.shards) for answer in self.answers.values())
        return f"{', '.join(told)}: {made:,} of {counted(total, 'shard')}" if told else ""


def check_source(rules: RowRules, listing: SourceListing) -> None:
    """One image that can be used is enough to begin; it is looked for before any worker starts. DataError where none is.

    Where the first rows all lack the image or caption that the recipe names, or whole files were no use, nobody reads the rest.
    Files that are known to be of no use, as those that a pattern names and that are not there, say nothing of the others.
    """
    reasons: dict[str, int] = {}
    looked, files = 0, sorted((unit for unit in listing.units if not unit.problem), key=lambda unit: unit.name)
    for unit in files[:FILES_LOOKED_AT]:
        for row in _first_rows(rules, unit):
            looked += 1
            try:
                usable_row(rules.data, row)
                return
            except DataError as error:
                reasons[str(error)] = reasons.get(str(error), 0) + 1
    lacking = reasons and all("data.caption_fields" in reason or "data.image_field" in reason for reason in reasons)
    if lacking or (len(files) <= FILES_LOOKED_AT and looked < LOOKED_AT):
        raise no_usable_image(named_urls(rules.data), reasons, list(listing.notes))


def _first_rows(rules: RowRules, unit: SourceUnit) -> Iterable[SourceRow]:
    """What cannot be read is left to the workers, who count it."""
    rows = open_rows(rules, unit, open_store(unit.file.base))
    try:
        yield from islice((row for row in rows if isinstance(row, SourceRow)), LOOKED_AT // FILES_LOOKED_AT)
    except (StoreNotFound, StoreDenied):
        return


def named_urls(data: Data) -> str:
    """The source, in messages."""
    more = f" and {len(data.urls) - 1} more" if len(data.urls) > 1 else ""
    return f"data.urls {data.urls[0]}{more}"


def usable_row(data: Data, row: SourceRow) -> DecodedImage:
    """Its picture. DataError with the reason that it is not taken."""
    if row.problem:
        raise DataError(row.problem)
    return stored_picture(data, storable(row.name), row.image)[0]


@dataclass
class IngestUnit:
    """Makes the raw shards of a ShardTask's source file."""

    data: Data
    store_url: str
    folder: str
    captions_needed: bool

    def __post_init__(self) -> None:
        self.worker = UnitWorker(self.data, self.store_url, self.folder, self.captions_needed)

    def __call__(self, task: ShardTask) -> MadeShard:
        made = self.worker(task.source)
        first, *others = (MadeShard(shard.record, stood=shard.stood, detail=made) for shard in made.shards)
        return MadeShard(first.record, stood=first.stood, detail=made, others=tuple(others))

    @property
    def progress(self) -> int:
        return self.worker.progress


def _notes(data: Data, facts: Iterable[NoteFacts]) -> list[str]:
    """What a person should know before hours are spent on rows that were read otherwise than they were meant."""
    counts: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for of_one in facts:
        for kind, (count, first) in of_one.items():
            counts[kind] = counts.get(kind, 0) + count
            names[kind] = sorted([*names.get(kind, ()), *first])[:NAMED]
    thing = THINGS[data.source]
    limit = f"{data.max_caption_chars:,} characters (data.max_caption_chars)"
    lines = {
        RowNote.DAMAGED: (thing, "damaged, and read as far as that goes"),
        RowNote.UNMARKED: (thing, "without an end mark, so rows may be missing at its end"),
        RowNote.NO_TABLE: ("img2dataset table", "not readable, so the rows that failed there are not counted"),
        RowNote.SEVERAL_IMAGES: ("sample", "with several images, one of which is taken (data.image_field names which)"),
        RowNote.BROKEN_JSON: ("sample", "whose json cannot be read"),
        RowNote.CUT: ("row", f"with a caption cut at {limit}"),
        RowNote.LONG: (
            "row",
            "with a caption of several lines, which are joined (data.caption=first_line takes the first)",
        ),
        RowNote.WITHOUT: ("row", "without a caption"),
    }
    return [
        f"{counted(counts[kind], what)} {said}: {some(names[kind], counts[kind])}"
        for kind, (what, said) in lines.items()
        if kind in counts
    ]
