"""Stage 3, caption: a synthetic caption for every image, beside the original one. Paper section 5.2.2."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.tables import caption_table
from workers.caption import caption_stage


@flow(name="caption", **FLOW_OPTIONS)
def caption(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """With captioner 'none' there is nothing to make: training then takes the original captions only."""
    with stage("caption", recipe, overrides, remake) as run:
        raw = run.upstream.raw
        if run.recipe.caption.captioner == "none":
            return run.finish(
                manifest=raw.path,
                digest=raw.digest,
                skipped=True,
                reason="the recipe names no captioner",
                table=[],
                warnings=[],
            )
        result = caption_stage(run.recipe, run.store, raw, run.report)
        return run.finish_parts({"captions": result}, table=caption_table(run.store, result))
