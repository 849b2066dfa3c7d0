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
        return StageNote.model_validate(store.get_json(_note_path(run, stage)))
    except (ValidationError, StoreError):
        return None  # none, or written by another version: it explains nothing, and decides nothing


def stage_noted_at(store: Store, run: str, stage: str) -> float:
    """When the note was last changed, Unix seconds by the store's clock; 0 where there is none."""
    path = _note_path(run, stage)
    return max((entry.modified for entry in store.list(path.rpartition("/")[0]) if entry.path == path), default=0.0)


def remember_stage(
    store: Store, run: str, stage: str, folder: str, digest: str, fields: dict[str, Any], warnings: tuple[str, ...] = ()
) -> None:
    """The stage has ended with this; the word that it was begun goes after it."""
    note = StageNote(folder=folder, digest=digest, fields=fields, warnings=warnings)
    if recall_stage(store, run, stage) != note:
        store.put_json(_note_path(run, stage), note.model_dump(mode="json"))
    end(store, run, stage, folder)


def _note_path(run: str, stage: str) -> str:
    return f"runs/{run}/stages/{stage}.json"


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
    """What a stage ended with, for the flow that called it."""

    stage: str
    manifest: ManifestRef
    skipped: bool
    reason: str  # why it was skipped or what made it work
    seconds: float
    done_before: int = 0  # shards
    made: int = 0  # shards
    rows: int = 0
    bytes: int = 0
    warnings: list[str] = field(default_factory=list)
