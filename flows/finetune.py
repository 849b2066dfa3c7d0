"""Stage 6, finetune: higher resolution, aspect buckets, QK-norm, shifted time.

Paper section 5.3.2.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.training import loss_pictures, make_latents, phases_table, train_phase
from flows.ui.tables import shard_table
from workers.stage import StageResult
from workers.trainer.stage import join_phases


@flow(name="finetune", **FLOW_OPTIONS)
def finetune(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Every fine-tuning phase in order: its latents where they do not stand, then steps from the EMA weights of the one before."""
    with stage("finetune", recipe, overrides, remake) as run:
        keys = [key for key, _ in run.recipe.phases()[1:]]
        if not keys:
            start, digest = run.upstream.last_checkpoint("pretrain"), run.upstream.last_digest("pretrain")
            reason = "the recipe has no fine-tuning phase"
            return run.finish(StageResult("finetune", start.folder, digest, skipped=True, reason=reason))
        latents, trained = [], []
        for key in keys:
            latents.append(make_latents(run, key))
            trained.append(train_phase(run, key))
        tables = [shard_table(run.store, {made.stage: made for made in latents}), phases_table(run, keys)]
        return run.finish(join_phases(trained, latents), tables, loss_pictures(run, keys))
