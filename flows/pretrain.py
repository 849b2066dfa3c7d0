"""Stage 5, pretrain: rectified flow on square low-resolution latents. Paper sections 3, 4, 5.3."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.training import loss_pictures, phases_table, train_phase


@flow(name="pretrain", **FLOW_OPTIONS)
def pretrain(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """From fresh weights, or those of model.start_from, to the recipe's samples; goes on from the last checkpoint where there is one."""
    with stage("pretrain", recipe, overrides, remake) as run:
        result = train_phase(run, "pretrain")
        return run.finish(result, [phases_table(run, ["pretrain"])], loss_pictures(run, ["pretrain"]))
