"""A training phase for both training flows: its job, curve and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flows.local.home import ensure, home
from flows.stage import StageRun
from flows.training_view import training_view
from flows.ui.loss_curve import loss_curve
from flows.ui.previews import preview_settings
from sd3core.checkpoint import read_checkpoint_done
from sd3core.data.begun import begin
from sd3core.data.store import Store
from sd3core.moving_average import short_average_warning
from sd3core.progress import Progress
from sd3core.specs import fingerprint
from workers.stage import NOTHING_TO_DO, StageNote, reason_to_work, recall_stage, remember_stage
from workers.trainer.checkpointing import last_whole_checkpoint, read_metrics
from workers.trainer.job import DataRef, TrainingJob
from workers.trainer.launch import train


@dataclass(frozen=True)
class PhaseResult:
    """What a phase ended with, as StageRun.finish takes it."""

    key: str
    manifest: str  # DONE.json of the last checkpoint
    digest: str
    skipped: bool
    reason: str
    table: list[dict[str, object]]
    warnings: list[str]
    pictures: dict[str, bytes]

    def shown(self) -> dict[str, Any]:
        names = ("manifest", "digest", "skipped", "reason", "table", "warnings", "pictures")
        return {name: getattr(self, name) for name in names}


def train_phase(run: StageRun, key: str) -> PhaseResult:
    """Trains one phase of the recipe to its end; a finished one returns at once."""
    job = phase_job(run, key)
    begin(run.store, run.recipe.run, key, job.folder, job.fields, [job.init])
    note = recall_stage(run.store, run.recipe.run, key)
    start = start_point(run.store, job, note)
    if start.samples < job.last_samples:
        run.log.info("%s starts at %s of %s samples: %s", key, f"{start.samples:,}", f"{job.last_samples:,}", start.why)
        run.report(Progress(start.samples, job.last_samples, "samples", f"starts here: {start.why}"))
    short = short_average_warning(key, job.training)
    if short:
        run.warn(short)
    with training_view(run, job) as view:
        result = train(job, run.recipe.compute, run.report, tell=view)
    last = result.checkpoints[-1]
    skipped = result.resumed_from == result.samples
    digest = read_checkpoint_done(run.store, last).digest
    known = note.warnings if skipped and note is not None and note.digest == digest else ()
    warnings = list(dict.fromkeys([*filter(None, [short]), *known, *result.warnings]))
    remember_stage(run.store, run.recipe.run, key, job.folder, digest, job.fields, tuple(warnings))
    return PhaseResult(
        key=key,
        manifest=f"{last}/DONE.json",
        digest=digest,
        skipped=skipped,
        reason=start.reason,
        table=checkpoint_table(run.store, key, result.checkpoints),
        warnings=warnings,
        pictures={f"loss, {key}": loss_curve(read_metrics(run.store, job.folder, job.last_samples), key)},
    )


def phase_job(run: StageRun, key: str) -> TrainingJob:
    recipe, store = run.recipe, run.store
    phase = dict(recipe.phases())[key]
    run.upstream.check_vae()
    inputs = run.upstream.phase_inputs(key)
    spec = fingerprint(inputs.fields)
    return TrainingJob(
        store=store.url,
        run=recipe.run,
        phase=key,
        spec=spec,
        fields=inputs.fields,
        model=recipe.model_config_for(phase).to_dict(),
        training=phase,
        seed=recipe.training_seed(phase),
        text=recipe.text,
        latents=DataRef(folder=inputs.latents.folder, digest=inputs.latents.digest),
        text_features=DataRef(folder=inputs.text.folder, digest=inputs.text.digest),
        init=inputs.start,
        recipe=recipe.model_dump(mode="json"),
        previews=preview_settings(run.upstream, phase),
        log_dir=str(ensure(home() / "logs" / recipe.run / f"{key}-{spec}")),
    )


def merge_phases(phases: list[PhaseResult]) -> PhaseResult:
    """Several phases of one stage as one result: the last one's checkpoint, everybody's rows."""
    if len(phases) == 1:
        return phases[0]
    return PhaseResult(
        key="finetune",
        manifest=phases[-1].manifest,
        digest=fingerprint([phase.digest for phase in phases]),
        skipped=all(phase.skipped for phase in phases),
        reason="; ".join(f"{phase.key}: {phase.reason}" for phase in phases),
        table=[row for phase in phases for row in phase.table],
        warnings=[warning for phase in phases for warning in phase.warnings],
        pictures={name: picture for phase in phases for name, picture in phase.pictures.items()},
    )


def checkpoint_table(store: Store, key: str, folders: list[str]) -> list[dict[str, object]]:
    rows = []
    for folder in folders:
        done = read_checkpoint_done(store, folder)
        rows.append(
            {
                "phase": key,
                "samples": f"{done.samples:,}",
                "steps": f"{done.steps:,}",
                "attempt": done.attempt,
                "checkpoint": store.uri(folder),
            }
        )
    return rows


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
