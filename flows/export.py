"""Stage 8, export: the last or best checkpoint as a folder that diffusers opens.

It holds the EMA weights; StableDiffusion3Pipeline.from_pretrained reads it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, StageRun, stage
from sd3core.checkpoint_record import CheckpointRef
from sd3core.metrics.best_checkpoint import best_checkpoint
from sd3core.specs import DONE_FILE
from sd3core.towers.artifact import fetch_towers
from workers.caches import checked_here, towers_cache
from workers.export import export_stage
from workers.stage import StageResult


@flow(name="export", **FLOW_OPTIONS)
def export(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Transformer, VAE, text encoders, tokenizers, scheduler, and a README with the call that fits the null convention.

    The checkpoint is the last phase's last one, or the best by the score that `export.checkpoint` names.

    Of a formulation that the pipeline cannot sample, of a rival or of three streams, which diffusers does not know, there is
    no folder: the stage is skipped, and says why. The last checkpoint itself is the result.
    """
    with stage("export", recipe, overrides, remake) as run:
        checkpoint, said = chosen_checkpoint(run)
        if problem := run.recipe.export_problem():
            of_training = f"{checkpoint.folder}/{DONE_FILE}", run.upstream.digest_of(checkpoint)
            return run.finish(StageResult("export", *of_training, skipped=True, reason=problem, notes=said))
        manifest = run.upstream.towers_manifest
        towers = fetch_towers(run.store, manifest.folder, towers_cache())
        result = export_stage(
            run.recipe,
            run.store,
            checkpoint.folder,
            run.upstream.facts_of(checkpoint),
            towers,
            manifest.digests,
            run.report,
            checked=checked_here(),
            reread_towers=lambda: fetch_towers(run.store, manifest.folder, towers_cache(), reread=True),
        )
        row = {"folder": run.store.uri(result.folder), "checkpoint": checkpoint.folder}
        row["chosen by"] = run.recipe.export.checkpoint
        return run.finish(replace(result, notes=[*said, *result.notes]), [[row]])


def chosen_checkpoint(run: StageRun) -> tuple[CheckpointRef, list[str]]:
    """The checkpoint of the last phase that `export.checkpoint` names, and what is to be said of the choice."""
    key, _ = run.recipe.phases()[-1]
    if run.recipe.export.score is None:
        return run.upstream.last_checkpoint(key), []
    candidates = run.upstream.checkpoints(key)
    best = best_checkpoint(run.store, run.recipe.run, key, candidates, run.recipe.export.score)
    return best.ref, [best.line]
