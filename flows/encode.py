"""Stage 4, encode: text features of every caption, VAE latents for pretraining.

Text is encoded once for all resolutions; the latents of a fine-tuning phase are made right before it. Paper appendix E.1.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.tables import shard_table
from workers.encode import encode_stage


@flow(name="encode", **FLOW_OPTIONS)
def encode(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Text serves all phases; of latents only those that come next are made."""
    with stage("encode", recipe, overrides, remake) as run:
        upstream = run.upstream
        inputs = upstream.raw, upstream.captions, upstream.towers
        result = encode_stage(run.recipe, run.store, *inputs, run.report, run.warn, upstream.keep)
        return run.finish(result, [shard_table(run.store, result.parts)])
