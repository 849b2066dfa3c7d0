"""Stage 6, finetune: higher resolution, aspect buckets, QK-norm, shifted time.

Paper section 5.3.2.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.training import merge_phases, train_phase


@flow(name="finetune", **FLOW_OPTIONS)
def finetune(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Every fine-tuning phase in order, each from the EMA weights of the one before."""
    with stage("finetune", recipe, overrides, remake) as run:
        results = []
        for index in range(len(run.recipe.finetune)):
            results.append(train_phase(run, f"finetune.{index}"))
        if not results:
            return run.finish(
                manifest=run.upstream.last_checkpoint("pretrain").folder,
                digest=run.upstream.last_digest("pretrain"),
                skipped=True,
                reason="the recipe has no fine-tuning phase",
                table=[],
            )
        return run.finish(**merge_phases(results).shown())
