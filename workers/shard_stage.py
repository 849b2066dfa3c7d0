"""Runs a stage that makes one shard from one shard, on actors.

What is missing is made, then the manifest is committed.

The store decides what is done: a stage whose manifest stands and matches is skipped, on any machine and in any run;
otherwise one listing tells which shards are missing, and only those are made. What is made again is told where its rows were
before (`ShardTask.earlier`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sd3core.data.begun import begin
from sd3core.data.manifest import Manifest, ManifestRef, ShardEntry, commit_manifest, is_whole, read_manifest
from sd3core.data.provenance import Provenance
from sd3core.data.shards import DoneRecord, finished_stems, read_shard_done, shard_number, shard_stem
from sd3core.data.slices import earlier_slices
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError
from sd3core.progress import Progress, ProgressCallback, ProgressMeter
from sd3core.recipe import Compute
from sd3core.specs import MANIFEST, fingerprint
from sd3core.words import NAMED, counted, some
from workers.pool import Outcome, PoolSettings, made_by, map_over_actors
from workers.ray_session import start_ray
from workers.stage import (
    NOTHING_TO_DO,
    StageFailed,
    StageNote,
    StageResult,
    reason_to_work,
    recall_stage,
    remember_stage,
)

NAMED_FAILURES = 5  # shards that an error names
UNNAMED_EARLIER = 4  # shards that the manifest does not name and that are looked at for rows, too
TELL_AFTER_S = 60.0  # of a stage at work: what a shorter one leaves out is told at its end alone


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made. `digest` (12 hex) names the content it is made from, "" where only who reads it can say;
    `source` is what the worker finds that by.
    """

    number: int
    digest: str
    folder: str  # of the output, in the store
    rows: int  # for progress
    source: Any = None
    earlier: tuple[str, ...] = ()  # stems of finished shards of the folder that may hold rows of this one
    called: str = ""  # in messages, where its number says nothing

    @property
    def stem(self) -> str:
        return shard_stem(self.number, self.digest)

    @property
    def name(self) -> str:
        """In messages."""
        return self.called or self.stem.rstrip(".")

    @property
    def place(self) -> str:
        """Names it among the tasks of several stages."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class MadeShard:
    """What a worker answers."""

    record: DoneRecord
    copied: int = 0  # of its units, those that stood in earlier shards
    made: int = 0  # those that did not
    told: tuple[str, ...] = ()  # earlier shards that were of no use
    stood: bool = False  # the shard, as the worker found when it had read its source
    detail: Any = None  # what else its stage is to hear
    others: tuple[MadeShard, ...] = ()  # where the source became several shards: those behind the first

    @property
    def shards(self) -> tuple[MadeShard, ...]:
        return (self, *self.others)


@dataclass(frozen=True)
class ShardStage:
    """What a stage makes: `tasks` in order of their numbers; `needs` are further files of the folder, written by any
    worker.
    """

    name: str  # the stage in this run, e.g. "latents.finetune.0"
    kind: str  # what the manifest calls it, e.g. "latents": two phases or runs that agree share it
    folder: str
    fields: dict[str, Any]  # what its spec is the fingerprint of
    inputs: dict[str, str]  # name -> manifest digest
    tasks: Sequence[ShardTask]
    needs: tuple[str, ...] = ()
    unit: str = "row"  # what a row of it is: "image", "caption"
    counted_in: str = ""  # what its tasks' `rows` are, where they are not such rows: "MB"
    task_name: str = "shard"  # what a task is, where one may become several shards: "tar"
    changes: Callable[[Sequence[MadeShard]], str] = lambda answers: ""  # says what changed in its source, where it can
    rules: dict[str, Any] = field(default_factory=dict)  # what its note says beside the fields: no part of its spec

    @property
    def stems(self) -> list[str]:
        return [task.stem for task in self.tasks]

    @property
    def noted(self) -> dict[str, Any]:
        """What the run's note says it was made by."""
        return self.fields | self.rules


def run_shard_stage(
    store: Store,
    run: str,
    stage: ShardStage,
    worker_class: type,
    worker_kwargs: dict[str, Any],
    compute: Compute,
    report: ProgressCallback,
) -> StageResult:
    """Makes what is missing of one stage. `compute`: as the stage has it. The worker is called with a ShardTask and returns a MadeShard.

    Raises StageFailed naming the shards given up and why, when all others are done; then no manifest is committed.
    """
    return run_shard_stages(store, run, [stage], worker_class, worker_kwargs, compute, report)[0]


def run_shard_stages(
    store: Store,
    run: str,
    stages: Sequence[ShardStage],
    worker_class: type,
    worker_kwargs: dict[str, Any],
    compute: Compute,
    report: ProgressCallback,
) -> list[StageResult]:
    """Several stages by the same workers, which load once and take their shards together."""
    started = time.monotonic()
    for stage in stages:
        begin(store, run, stage.name, stage.folder, stage.fields | {"inputs": stage.inputs})
    states = [_look(store, run, stage) for stage in stages]
    todo = [task for state in states for task in state.missing]
    total_rows = sum(task.rows for stage in stages for task in stage.tasks)
    units = {stage.counted_in or f"{stage.unit}s" for stage in stages}
    unit = units.pop() if len(units) == 1 else "rows"
    meter = ProgressMeter(total_rows, unit, report, already_done=total_rows - sum(task.rows for task in todo))
    outcomes: list[Outcome[ShardTask]] = []
    if todo:
        tally = _Tally(meter, {stage.folder: stage.unit for stage in stages}, stages[0].task_name)
        with start_ray(compute):
            outcomes = map_over_actors(
                worker_class, worker_kwargs, todo, PoolSettings.of(compute), tally.finished, tally.working, tally.tell
            )
    failures = [
        f"{o.task.folder}/{o.task.name} ({o.error}, {o.attempts} attempts)" for o in outcomes if o.error is not None
    ]
    if failures:
        more = f" and {len(failures) - NAMED_FAILURES} more" if len(failures) > NAMED_FAILURES else ""
        raise StageFailed(
            f"{', '.join(stage.name for stage in stages)}: {len(failures)} of {len(todo)} shards could not be made:"
            f" {'; '.join(failures[:NAMED_FAILURES])}{more}; put that right and run it again: the other shards are kept"
        )
    return [_conclude(store, run, state, outcomes, compute.actors, started) for state in states]


class _Tally:
    """Rows of finished shards plus those that busy workers say they have done."""

    def __init__(self, meter: ProgressMeter, units: dict[str, str], task_name: str = "shard") -> None:
        """`units`: what a row is, by the stage's folder."""
        self.meter, self.units, self.task_name = meter, units, task_name
        self.finished_rows = meter.already_done
        self.busy: dict[str, int] = {}
        self.left_out: Counter[tuple[str, str]] = Counter()  # by what it is and the reason
        self.told: set[tuple[str, str]] = set()
        self.started = time.monotonic()

    def working(self, task: ShardTask, progress: int | Mapping[str, int] | Progress) -> None:
        """`progress`: rows, or those of each shard that the worker is at, or a Progress of what it does before the first one."""
        if isinstance(progress, Progress):
            self._show(progress.note)
            return
        rows = progress if isinstance(progress, int) else progress.get(task.place, 0)
        self.busy[task.place] = min(rows, task.rows)
        self._show("")

    def finished(self, outcome: Outcome[ShardTask], done: int, total: int) -> None:
        task = outcome.task
        self.busy.pop(task.place, None)
        self.finished_rows += task.rows
        if outcome.error:
            given_up = f"{self.task_name} {task.name} given up: {outcome.error}"
            self._show(given_up, given_up)
            return
        failed = (row for made in outcome.result.shards for row in made.record.failed)
        self.left_out.update((self.units[task.folder], row.reason) for row in failed)
        self._show(f"{self.task_name} {done}/{total}", self._new_reasons())

    def _new_reasons(self) -> str:
        """What has been left out, each reason once, where the stage's end, which counts and names it, is not near."""
        if time.monotonic() - self.started < TELL_AFTER_S:
            return ""
        new = sorted(self.left_out.keys() - self.told)
        self.told.update(new)
        return "; ".join(f"so far {left_out_line(unit, self.left_out[unit, reason], reason)}" for unit, reason in new)

    def tell(self, warning: str) -> None:
        self._show(warning, warning)

    def _show(self, note: str, warning: str = "") -> None:
        self.meter.update(self.finished_rows + sum(self.busy.values()), note, warning)


def left_out_line(unit: str, count: int, reason: str) -> str:
    return f"{counted(count, unit)} left out: {reason}"


@dataclass(frozen=True)
class _State:
    """What stands of a stage before anything is made."""

    stage: ShardStage
    note: StageNote | None
    newest: Manifest | None  # what MANIFEST.json says
    standing: list[Manifest]  # that, and what this run used last
    missing: list[ShardTask]
    damaged: str | None  # MANIFEST.json where it, or its copy under its digest, is not what was committed

    def matching(self, stage: ShardStage) -> Manifest | None:
        """The manifest that stands and is of just this stage."""
        return next((manifest for manifest in self.standing if _matches(manifest, stage)), None)


def _look(store: Store, run: str, stage: ShardStage) -> _State:
    note = recall_stage(store, run, stage.name)
    finished = finished_stems(store, stage.folder)
    missing = [task for task in stage.tasks if task.stem not in finished]
    if not missing and stage.tasks and not all(store.exists(f"{stage.folder}/{name}") for name in stage.needs):
        missing = list(stage.tasks[:1])  # its worker writes them
    newest, damaged = _manifest_or_none(store, stage.folder, None), None
    if store.exists(f"{stage.folder}/{MANIFEST}") and not (newest and is_whole(store, newest)):
        newest, damaged = None, store.uri(f"{stage.folder}/{MANIFEST}")  # the done records have all that stood there
    candidates = [newest]
    if note is not None and note.folder == stage.folder and newest is not None:
        # Without a newest one the folder was taken back (--from-stage): shards made since are not those of an older one.
        candidates.append(_manifest_or_none(store, stage.folder, note.digest))
    standing = [manifest for manifest in candidates if manifest is not None]
    missing = _with_earlier(stage, missing, standing[0] if standing else None, finished)
    return _State(stage, note, newest, standing, missing, damaged)


def _with_earlier(
    stage: ShardStage, missing: list[ShardTask], standing: Manifest | None, finished: dict[str, float]
) -> list[ShardTask]:
    """The missing shards, each with those that may hold its rows: the manifest's, then what else is finished, newest first."""
    if not missing or not finished:
        return missing
    named = [entry.stem for entry in standing.shards if entry.stem in finished] if standing else []
    others = sorted(finished.keys() - set(named) - set(stage.stems), key=lambda stem: -finished[stem])
    of_manifest, unnamed = (_earlier_stems(stage, missing, stems) for stems in (named, others))
    return [
        replace(task, earlier=(*of_manifest[task.number], *unnamed[task.number][:UNNAMED_EARLIER])) for task in missing
    ]


def _earlier_stems(stage: ShardStage, missing: list[ShardTask], stems: list[str]) -> dict[int, list[str]]:
    """Number of a missing shard -> those of the stems where its rows may be."""
    by_number: dict[int, list[str]] = {}
    for stem in stems:
        by_number.setdefault(shard_number(stem), []).append(stem)
    places = earlier_slices((task.number for task in missing), by_number, (task.number for task in stage.tasks))
    return {number: [stem for other in numbers for stem in by_number[other]] for number, numbers in places.items()}


def _matches(manifest: Manifest, stage: ShardStage) -> bool:
    return (
        manifest.spec == fingerprint(stage.fields)
        and manifest.inputs == stage.inputs
        and [entry.stem for entry in manifest.shards] == stage.stems
    )


def _manifest_or_none(store: Store, folder: str, digest: str | None) -> Manifest | None:
    try:
        return read_manifest(store, folder, digest)
    except (DataError, StoreError):
        return None


def _conclude(
    store: Store, run: str, state: _State, outcomes: list[Outcome[ShardTask]], actors: int, started: float
) -> StageResult:
    ended = [o for o in outcomes if o.task.folder == state.stage.folder]
    answers = {o.task.number: o.result for o in ended}
    stage = _with_digests(state.stage, answers)
    made_here = [made for answer in answers.values() for made in answer.shards if not made.stood]
    changes = stage.changes(list(answers.values()))
    standing = state.matching(stage)
    if standing is not None and not made_here:
        manifest, reason = standing, NOTHING_TO_DO
        reference = ManifestRef(stage.folder, manifest.digest)
        # Another run has added shards to the folder: let later stages find this one first.
        if manifest is not state.newest:
            commit_manifest(store, stage.folder, manifest)
    else:
        reason = changes or reason_to_work(
            state.note, stage.folder, stage.noted, len(made_here), len(stage.tasks), "shard"
        )
        if state.damaged:
            reason = f"{state.damaged} or its copy was damaged, and is written again" + (
                f"; {reason}" if made_here else ""
            )
        reason += _rows_made(made_here, stage.unit)
        known = standing or next(iter(state.standing), None)
        records = {made.record.stem: made.record for answer in answers.values() for made in answer.shards}
        manifest = _build_manifest(store, stage, known, records)
        reference = commit_manifest(store, stage.folder, manifest, _made_by(ended, actors))
        store.remove_abandoned(stage.folder)
    remember_stage(store, run, stage.name, stage.folder, reference.digest, stage.noted)
    return StageResult(
        stage=stage.name,
        path=reference.path,
        digest=reference.digest,
        skipped=reason == NOTHING_TO_DO,
        reason=reason,
        seconds=time.monotonic() - started,
        done_before=len(stage.tasks) - len(made_here),
        made=len(made_here),
        rows=manifest.rows,
        bytes=manifest.bytes,
        warnings=[*_left_out(store, manifest, stage.unit), *(line for made in made_here for line in made.told)],
    )


def _made_by(ended: list[Outcome[ShardTask]], actors: int) -> Provenance:
    """Of the tasks whose shards did not all stand before."""
    return made_by([o for o in ended if not all(made.stood for made in o.result.shards)], actors)


def _with_digests(stage: ShardStage, answers: dict[int, MadeShard]) -> ShardStage:
    """The stage with the shards that were made: only their workers may have known digests, and how many a source becomes."""
    tasks = []
    for task in stage.tasks:
        shards = answers[task.number].shards if task.number in answers else ()
        tasks += [
            replace(task, number=made.record.number, digest=made.record.stem.partition(".")[2]) for made in shards
        ] or [task]
    return replace(stage, tasks=tasks)


def _rows_made(made_here: list[MadeShard], unit: str) -> str:
    """How many of the shards' rows were made, where some were taken from earlier shards."""
    copied, made = (sum(getattr(shard, name) for shard in made_here) for name in ("copied", "made"))
    return f"; {counted(made, unit)} made, {copied:,} taken over as they were" if copied else ""


def _left_out(store: Store, manifest: Manifest, unit: str) -> list[str]:
    """A line for every reason, with the first names: the manifest counts, the done records name."""
    names: dict[str, list[str]] = {reason: [] for reason in manifest.failed_reasons}
    wanted = {reason: min(count, NAMED) for reason, count in manifest.failed_reasons.items()}
    for entry in manifest.shards:
        if any(len(names[reason]) < wanted[reason] for reason in entry.failed):
            with suppress(DataError, StoreError):  # a line without names is better than a stage that fails over it
                for row in read_shard_done(store, manifest.folder, entry.stem).failed:
                    names.setdefault(row.reason, []).append(row.key)
    return [
        left_out_line(unit, count, reason) + (f": {some(sorted(names[reason]), count)}" if names[reason] else "")
        for reason, count in sorted(manifest.failed_reasons.items())
    ]


def _build_manifest(
    store: Store, stage: ShardStage, standing: Manifest | None, made: dict[str, DoneRecord]
) -> Manifest:
    """The manifest from the done records just made, the standing manifest's entries, and only then the records in the store."""
    known: dict[str, ShardEntry] = {entry.stem: entry for entry in standing.shards} if standing else {}
    records = dict(made)
    unknown = [stem for stem in stage.stems if stem not in records and stem not in known]
    with ThreadPoolExecutor(16) as threads:
        records |= dict(
            zip(unknown, threads.map(lambda stem: read_shard_done(store, stage.folder, stem), unknown), strict=True)
        )
    shards = [ShardEntry.of(records[stem]) if stem in records else known[stem] for stem in stage.stems]
    return Manifest(
        stage=stage.kind,
        spec=fingerprint(stage.fields),
        fields=stage.fields,
        inputs=stage.inputs,
        folder=stage.folder,
        shards=shards,
    )
