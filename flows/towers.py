"""Stage 2, towers: the VAE, the text encoders and the judging CLIP.

Small ones are made, released ones are checked.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.data_pictures import autoencoder_pictures
from flows.ui.tables import towers_table
from workers.towers import towers_stage


@flow(name="towers", **FLOW_OPTIONS)
def towers(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Towers are pinned: once made they stay, whatever is added to the data set."""
    with stage("towers", recipe, overrides, remake) as run:
        run.upstream.check_vae()
        raw = run.upstream.raw
        result = towers_stage(run.recipe, run.store, raw, run.report)
        pictures = {} if result.skipped else autoencoder_pictures(run.recipe, run.store, raw, result.manifest)
        return run.finish(result, [towers_table(run.store, result)], pictures)
