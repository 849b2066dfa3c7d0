"""Trains one phase as a stage: says where it starts, and notes its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.begun import begin
from sd3core.data.store import Store
from sd3core.moving_average import short_average_warning
from sd3core.progress import Progress, ProgressCallback, ignore_progress
from sd3core.recipe import Recipe
from sd3core.specs import DONE_FILE, fingerprint
from workers.caches import checked_here
from workers.stage import (
    NOTHING_TO_DO,
    StageNote,
    StageResult,
    join_results,
    reason_to_work,
    recall_stage,
    remember_stage,
)
from workers.trainer.job import TrainingJob
from workers.trainer.launch import train
from workers.trainer.news import NewsCallback, ignore_news
from workers.trainer.standing_checkpoints import last_whole_checkpoint


def train_stage(
    recipe: Recipe,
    store: Store,
    job: TrainingJob,
    report: ProgressCallback = ignore_progress,
    tell: NewsCallback = ignore_news,
    *,
    warn: Callable[[str], None] = lambda warning: None,
    say: Callable[[str], None] = lambda line: None,
) -> StageResult:
    """Trains one phase of the recipe to its end; a finished one returns at once. The result names the last checkpoint.

    `tell` hears of losses, warnings and pictures as they come, `warn` of what can be told before the first step, `say` where
    the phase starts. Raises TrainingFailed.
    """
    started = time.monotonic()
    begin(store, job.run, job.phase, job.folder, job.fields, [job.init])
    note = recall_stage(store, job.run, job.phase)
    start = start_point(store, job, note)
    if start.samples < job.last_samples:
        say(f"{job.phase} starts at {start.samples:,} of {job.last_samples:,} samples: {start.why}")
        report(Progress(start.samples, job.last_samples, "samples", f"starts here: {start.why}"))
    short = short_average_warning(job.phase, job.training)
    if short:
        warn(short)
    trained = train(job, recipe.compute, report, tell=tell)
    last = trained.checkpoints[-1]
    skipped = trained.resumed_from == trained.samples
    digest = read_checkpoint_done(store, last).digest
    known = note.warnings if skipped and note is not None and note.digest == digest else ()
    warnings = list(dict.fromkeys([*filter(None, [short]), *known, *trained.warnings]))
    remember_stage(store, job.run, job.phase, job.folder, digest, job.fields, tuple(warnings))
    return StageResult(
        stage=job.phase,
        path=f"{last}/{DONE_FILE}",
        digest=digest,
        skipped=skipped,
        reason=start.reason,
        seconds=time.monotonic() - started,
        notes=warnings,
    )


def join_phases(phases: list[StageResult], latents: Sequence[StageResult] = ()) -> StageResult:
    """Several phases of one stage, and the latents that were made for them, as one result: the last phase's checkpoint.

    The reason is that of what had work to do; of all phases where nothing had.
    """
    parts = {part.stage: part for part in (*latents, *phases)}
    at_work = [part for part in parts.values() if not part.skipped] or phases
    reason = "; ".join(f"{part.stage}: {part.reason}" for part in at_work)
    if len(phases) == 1:
        only = phases[0]
        return join_results("finetune", parts, only.digest, only.reason if at_work == phases else reason)
    return join_results("finetune", parts, fingerprint([phase.digest for phase in phases]), reason)


@dataclass(frozen=True)
class StartPoint:
    """How many samples stand when a phase starts, why it starts there, and the reason that its outcome gives for its work."""

    samples: int
    why: str
    reason: str


def start_point(store: Store, job: TrainingJob, note: StageNote | None) -> StartPoint:
    """The last whole checkpoint of the phase's settings that is not past its end, else 0 with what changed since this run
    last trained it.
    """
    standing = last_whole_checkpoint(store, job.folder, last_samples=job.last_samples)
    if standing and standing.samples == job.last_samples:  # nobody else may read it before its weights are needed
        standing = last_whole_checkpoint(store, job.folder, last_samples=job.last_samples, checked=checked_here())
    if standing and standing.samples == job.last_samples:
        return StartPoint(standing.samples, NOTHING_TO_DO, NOTHING_TO_DO)
    if standing:
        why = "the last whole checkpoint of these settings"
        return StartPoint(standing.samples, why, f"went on from {standing.samples:,} samples")
    names = {"training": job.phase, "init": "its starting checkpoint"}
    reason = reason_to_work(note, job.folder, job.fields, 1, 1, "phase", names)
    before = note.fields.get("training", {}).get("samples") if note else None
    if before not in (None, job.fields["training"].get("samples", before)):
        reason += f" (under schedule {job.training.schedule} the rate of every step depends on them)"
    return StartPoint(0, reason, reason)
