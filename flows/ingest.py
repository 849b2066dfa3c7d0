"""Stage 1, ingest: images into WebDataset shards, a part of them held out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.data_pictures import image_pictures
from flows.ui.tables import shard_table
from workers.ingest import ingest_stage


@flow(name="ingest", **FLOW_OPTIONS)
def ingest(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """`recipe`: a shipped recipe's name or a path. `overrides`: section.key=value."""
    with stage("ingest", recipe, overrides, remake) as run:
        result = ingest_stage(run.recipe, run.store, run.report, run.warn)
        pictures = {} if result.skipped else image_pictures(run.recipe, run.store, result.manifest)
        return run.finish(result, [shard_table(run.store, {"raw": result}, "images")], pictures)
