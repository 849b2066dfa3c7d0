"""Stage 3, caption: a synthetic caption for every image, beside the original one. Paper section 5.2.2."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.captions import caption_tables
from workers.caption import caption_stage


@flow(name="caption", **FLOW_OPTIONS)
def caption(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """With captioner 'none' there is nothing to make: training then takes the original captions only."""
    with stage("caption", recipe, overrides, remake) as run:
        result = caption_stage(run.recipe, run.store, run.upstream.raw, run.report, run.upstream.keep)
        captioned = run.recipe.caption.captioner != "none"
        return run.finish(result, caption_tables(run.recipe, run.store, result) if captioned else [])
