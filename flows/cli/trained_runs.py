"""Finds a run by its name alone: its checkpoints keep its recipe.

The file and the settings it was started with are not needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.recipe import Recipe, Training
from sd3core.recipe_file import recipe_of
from sd3core.specs import DONE_FILE, RUNS, phase_folder, run_folder
from workers.stage import recall_stage, stage_noted_at

CHECKPOINT = re.compile(rf"{phase_folder('([^/]+)', '([^/]+)', '([^/]+)')}/(\d{{12}})/{re.escape(DONE_FILE)}")
NAMED_RUNS = 12  # of the runs that an error names


@dataclass(frozen=True)
class TrainedRun:
    """A run's newest checkpoint, and the recipe that it was trained by."""

    checkpoint: str  # URL
    recipe: Recipe  # with the store that the run was found in
    phase: Training  # that made the checkpoint
    unfinished: str  # what is missing, "" of a run that was trained to its end


def trained_run(store: Store, run: str, overrides: list[str] | None = None) -> TrainedRun:
    """The newest checkpoint of the last phase that has any; of several trainings of that phase the one that the run last ended,
    and of that the checkpoint that it ended with: a longer training may have made others in the same folder.

    `overrides` change the recipe that is read with it. UserError where the run has none: it names those that have.
    """
    found = _checkpoints(store, run_folder(run, "checkpoints")) if _is_name(run) else []
    if not found:
        raise UserError(f"--run {run}: {_those_that_are(store)}")
    phase = max((checkpoint.phase for checkpoint in found), key=_order)
    newest, ended = _newest(store, run, [checkpoint for checkpoint in found if checkpoint.phase == phase])
    done = read_checkpoint_done(store, newest.folder)
    if done.recipe is None:
        raise UserError(
            f"--run {run}: {store.uri(newest.folder)} holds no recipe; name it with --checkpoint, and its --towers"
        )
    recipe = recipe_of(
        dict(done.recipe), overrides, f"--run {run}: the recipe in {store.uri(newest.folder)}/{DONE_FILE}"
    )
    recipe = recipe.model_copy(update={"store": store.url})
    phases = dict(recipe.phases())
    unfinished = ""
    end = _end(phases[phase], done.training) if phase in phases else 0
    if phase != list(phases)[-1] or (not ended and newest.samples < end):
        of = f" of {end:,}" if phase in phases else ""
        unfinished = f"run {run} is not trained to its end: this is {phase} after {newest.samples:,}{of} samples"
    return TrainedRun(store.uri(newest.folder), recipe, phases.get(phase, recipe.phases()[-1][1]), unfinished)


def _end(phase: Training, trained: dict[str, Any]) -> int:
    """The samples at which a phase ends. `trained`: its settings as the checkpoint has them, ended where max_epochs ends it."""
    return phase.samples if phase.max_epochs is None else trained["samples"]


@dataclass(frozen=True)
class _Checkpoint:
    run: str
    phase: str
    samples: int
    folder: str
    written: float  # Unix seconds by the store's clock


def _newest(store: Store, run: str, found: list[_Checkpoint]) -> tuple[_Checkpoint, bool]:
    """The newest of a phase's checkpoints, and whether the run ended the phase with it.

    One that was written after the run's note of that end is of a longer training under way.
    """
    phase = found[0].phase
    note, noted_at = recall_stage(store, run, phase), stage_noted_at(store, run, phase)
    of_note = [checkpoint for checkpoint in found if note and checkpoint.folder.startswith(f"{note.folder}/")]
    since = [checkpoint for checkpoint in of_note if checkpoint.written > noted_at]
    for checkpoint in () if since else sorted(of_note, key=_samples, reverse=True):
        if read_checkpoint_done(store, checkpoint.folder).digest == note.digest:
            return checkpoint, True
    return max(since or of_note or found, key=_samples), False


def _samples(checkpoint: _Checkpoint) -> int:
    return checkpoint.samples


def _checkpoints(store: Store, prefix: str) -> list[_Checkpoint]:
    entries = [(entry, CHECKPOINT.fullmatch(entry.path)) for entry in store.list(prefix)]
    return [
        _Checkpoint(m[1], m[2], int(m[4]), m[0].removesuffix(f"/{DONE_FILE}"), entry.modified)
        for entry, m in entries
        if m
    ]


def _order(phase: str) -> tuple[int, ...]:
    """pretrain, then finetune.0, finetune.1, ..."""
    return tuple(int(part) for part in re.findall(r"\d+", phase)) or (-1,)


def _is_name(run: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", run) is not None


def _those_that_are(store: Store) -> str:
    runs = sorted({checkpoint.run for checkpoint in _checkpoints(store, RUNS)})
    if not runs:
        return f"no run in {store.url} has a checkpoint"
    more = f" and {len(runs) - NAMED_RUNS} more" if len(runs) > NAMED_RUNS else ""
    return f"no checkpoint of such a run in {store.url}; there are: {', '.join(runs[:NAMED_RUNS])}{more}"
