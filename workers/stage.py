"""What a stage hands to its page, and the note of what it used.

The note stands at runs/RUN/stages/STAGE.json. From it a stage that is made again can say which field of the recipe is the cause. A note explains; it decides nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sd3core.data.begun import end
from sd3core.data.manifest import ManifestRef, explain_difference
from sd3core.data.store import Store
from sd3core.errors import StoreError, UserError
from sd3core.specs import stage_note_path
from sd3core.words import counted

NOTHING_TO_DO = "finished before, nothing to do"


class StageNote(BaseModel):
    """What a run last used for a stage."""

    model_config = ConfigDict(frozen=True)

    folder: str
    digest: str
    fields: dict[str, Any]
    warnings: tuple[str, ...] = ()  # of its making, for a later run that has nothing to do


def recall_stage(store: Store, run: str, stage: str) -> StageNote | None:
    try:
        return StageNote.model_validate(store.get_json(stage_note_path(run, stage)))
    except (ValidationError, StoreError):
        return None  # none, or written by another version: it explains nothing, and decides nothing


def stage_noted_at(store: Store, run: str, stage: str) -> float:
    """When the note was last changed, Unix seconds by the store's clock; 0 where there is none."""
    path = stage_note_path(run, stage)
    return max((entry.modified for entry in store.list(path.rpartition("/")[0]) if entry.path == path), default=0.0)


def remember_stage(
    store: Store, run: str, stage: str, folder: str, digest: str, fields: dict[str, Any], warnings: tuple[str, ...] = ()
) -> None:
    """The stage has ended with this; the word that it was begun goes after it."""
    note = StageNote(folder=folder, digest=digest, fields=fields, warnings=warnings)
    if recall_stage(store, run, stage) != note:
        store.put_json(stage_note_path(run, stage), note.model_dump(mode="json"))
    end(store, run, stage, folder)


def reason_to_work(
    note: StageNote | None,
    folder: str,
    fields: dict[str, Any],
    missing: int,
    total: int,
    thing: str,
    names: dict[str, str] | None = None,
) -> str:
    """Why a stage has work to do: which field changed since this run last used the stage, and how many things are missing.

    `names`: what a reader calls some of the fields.
    """
    causes = []
    if note is not None and note.fields != fields:
        causes = [_readable(line, names or {}) for line in explain_difference(note.fields, fields)]
    elif note is not None and note.folder != folder:
        causes = [f"{note.folder} -> {folder}"]
    elif note is None and missing == total:
        causes = ["first run"]
    if missing and causes != ["first run"] and not (causes and total == 1):
        causes.append(f"{missing:,} of {counted(total, thing)} {'was' if missing == 1 else 'were'} missing")
    return "; ".join(causes) or "its inputs or its list of shards changed"


def _readable(difference: str, names: dict[str, str]) -> str:
    """A fingerprint says nothing to a reader: "raw: 0123456789ab -> ba9876543210" becomes "raw changed"."""
    field, change = difference.split(": ", 1)
    first, dot, rest = field.partition(".")
    named = f"{names.get(first, first)}{dot}{rest}"
    fingerprints = re.fullmatch(r"([0-9a-f]{12,64}|None) -> ([0-9a-f]{12,64}|None)", change)
    return f"{named} changed" if fingerprints else f"{named}: {change}"


class StageFailed(UserError):
    """Shards that could not be made, after every other shard was."""


@dataclass(frozen=True)
class StageResult:
    """What a stage or a part of it ended with, for the flow that called it.

    `warnings` are told at its end where the run is followed, too: a later stage may fail, and no summary would have them.
    `notes` stand in the log and the summary alone: they were told when they came, or nothing comes after them.
    """

    stage: str
    path: str  # in the store, of the record that says it is done: a manifest, a checkpoint's DONE.json, scores.json
    digest: str  # of what was made
    skipped: bool
    reason: str  # why it was skipped or what made it work
    seconds: float = 0.0
    done_before: int = 0  # shards, towers or parts of scores
    made: int = 0
    rows: int = 0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, StageResult] = field(default_factory=dict)  # by name, where a stage makes several things

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def manifest(self) -> ManifestRef:
        """Of a stage that commits one."""
        return ManifestRef(self.folder, self.digest)


def join_results(stage: str, parts: dict[str, StageResult], digest: str, reason: str) -> StageResult:
    """A stage's parts as its result: the record is the last one's, and it was skipped where all were."""
    results = list(parts.values())
    return StageResult(
        stage=stage,
        path=results[-1].path,
        digest=digest,
        skipped=all(result.skipped for result in results),
        reason=reason,
        seconds=max(result.seconds for result in results),
        done_before=sum(result.done_before for result in results),
        made=sum(result.made for result in results),
        rows=sum(result.rows for result in results),
        bytes=sum(result.bytes for result in results),
        warnings=[warning for result in results for warning in result.warnings],
        notes=[note for result in results for note in result.notes],
        parts=parts,
    )
