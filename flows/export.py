"""Stage 8, export: the last checkpoint as a folder that diffusers opens.

It holds the EMA weights; StableDiffusion3Pipeline.from_pretrained reads it.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from sd3core.specs import DONE_FILE
from sd3core.towers.artifact import fetch_towers
from workers.caches import checked_here, towers_cache
from workers.export import export_stage
from workers.stage import StageResult


@flow(name="export", **FLOW_OPTIONS)
def export(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Transformer, VAE, text encoders, tokenizers, scheduler, and a README with the call that fits the null convention.

    Of a formulation that the pipeline cannot sample, of a rival or of three streams, which diffusers does not know, there is
    no folder: the stage is skipped, and says why. The last checkpoint itself is the result.
    """
    with stage("export", recipe, overrides, remake) as run:
        key, _ = run.recipe.phases()[-1]
        last = run.upstream.last_checkpoint(key)
        if problem := run.recipe.export_problem():
            of_training = f"{last.folder}/{DONE_FILE}", run.upstream.last_digest(key)
            return run.finish(StageResult("export", *of_training, skipped=True, reason=problem))
        manifest = run.upstream.towers_manifest
        towers = fetch_towers(run.store, manifest.folder, towers_cache())
        result = export_stage(
            run.recipe,
            run.store,
            last.folder,
            run.upstream.last_facts(key),
            towers,
            manifest.digests,
            run.report,
            checked=checked_here(),
            reread_towers=lambda: fetch_towers(run.store, manifest.folder, towers_cache(), reread=True),
        )
        return run.finish(result, [[{"folder": run.store.uri(result.folder), "checkpoint": last.folder}]])
