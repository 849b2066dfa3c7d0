"""A training phase for both training flows: latents, job, curve, checkpoints."""

from __future__ import annotations

from dataclasses import replace

from flows.local.home import ensure, home
from flows.stage import StageRun
from flows.training_view import training_view
from flows.ui.loss_curve import loss_curve
from flows.ui.previews import preview_settings
from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.phase_images import epochs_line, many_epochs_warning
from sd3core.errors import DataError
from sd3core.specs import fingerprint
from workers.encode import encode_phase
from workers.stage import StageResult
from workers.trainer.job import TrainingJob
from workers.trainer.stage import train_stage
from workers.trainer.standing_checkpoints import read_metrics


def make_latents(run: StageRun, key: str) -> StageResult:
    """Makes what is missing of a phase's latents, as encode has done for the first phase.

    Its warnings are told before the training that they are of. Raises NotFinishedError where the phase before, or text, is to come:
    hours of encoding would end in that.
    """
    upstream = run.upstream
    upstream.start_of(key)
    inputs = upstream.raw, upstream.text, upstream.towers
    captions = upstream.captions if run.recipe.encode.flip else None
    result = encode_phase(run.recipe, run.store, key, *inputs, run.report, run.warn, upstream.keep, captions)
    for warning in result.warnings:
        run.warn(warning)
    return result


def train_phase(run: StageRun, key: str) -> StageResult:
    """Trains one phase of the recipe to its end, with a view of it in the UI; a finished one returns at once."""
    job = phase_job(run, key)
    told = _tell_epochs(run, key)
    with training_view(run, job) as view:
        result = train_stage(run.recipe, run.store, job, run.report, view, warn=run.warn, say=run.log.info)
    return replace(result, notes=[*told, *result.notes])


def _tell_epochs(run: StageRun, key: str) -> list[str]:
    """Says in the log how often a phase sees its images; returns what is warned of that."""
    phase, images = dict(run.recipe.phases())[key], _images(run, key)
    if images is None:
        return []
    run.log.info(epochs_line(key, phase, images))
    warnings = list(filter(None, [many_epochs_warning(key, phase, images)]))
    for warning in warnings:
        run.warn(warning)
    return warnings


def _images(run: StageRun, key: str) -> int | None:
    """The images of a phase; None where nobody counted the rows without a caption, as before an earlier version's training ended.

    A phase that is still to be trained needs that count, and its loader says so.
    """
    try:
        return run.upstream.images(key)
    except DataError:
        return None


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
        training=inputs.training,
        seed=recipe.training_seed(phase),
        text=recipe.text,
        latents=inputs.latents,
        text_features=inputs.text,
        init=inputs.start,
        recipe=recipe.model_dump(mode="json"),
        previews=preview_settings(run.upstream, key, phase),
        log_dir=str(ensure(home() / "logs" / recipe.run / f"{key}-{spec}")),
    )


def phases_table(run: StageRun, keys: list[str]) -> list[dict[str, object]]:
    """A row for each checkpoint of phases that have been trained."""
    rows = []
    for key in keys:
        images = _images(run, key)
        for checkpoint in run.upstream.checkpoints(key):
            done = read_checkpoint_done(run.store, checkpoint.folder)
            row = {"phase": key, "samples": f"{done.samples:,}", "epochs": "not known"}
            row |= {"epochs": f"{done.samples / images:,.1f}"} if images else {}
            row |= {"steps": f"{done.steps:,}", "attempt": done.attempt}
            rows.append(row | {"checkpoint": run.store.uri(checkpoint.folder)})
    return rows


def loss_pictures(run: StageRun, keys: list[str]) -> dict[str, bytes]:
    """Caption -> PNG, the whole curve of each phase that has been trained."""
    pictures = {}
    for key in keys:
        last = run.upstream.last_checkpoint(key)
        rows = read_metrics(run.store, last.folder.rpartition("/")[0], last.samples)
        pictures[f"loss, {key}"] = loss_curve(rows, key)
    return pictures
