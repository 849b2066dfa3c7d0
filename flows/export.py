"""Stage 8, export: the last checkpoint as a folder that diffusers opens.

It holds the EMA weights; StableDiffusion3Pipeline.from_pretrained reads it.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from sd3core.checkpoint import DONE_FILE
from sd3core.data.begun import begin
from sd3core.progress import Progress
from sd3core.towers.artifact import fetch_towers
from workers.caches import checked_here, towers_cache
from workers.export import export_stage
from workers.stage import NOTHING_TO_DO, remember_stage


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
            return run.finish(
                manifest=f"{last.folder}/{DONE_FILE}",
                digest=run.upstream.last_digest(key),
                skipped=True,
                reason=problem,
                table=[],
            )
        manifest = run.upstream.towers_manifest
        towers = fetch_towers(run.store, manifest.folder, towers_cache())
        run.report(Progress(0, 1, "folders"))
        exported = export_stage(
            run.recipe,
            run.store,
            last.folder,
            towers,
            manifest.digests,
            checked=checked_here(),
            begin=lambda folder, fields: begin(run.store, run.recipe.run, "export", folder, fields, [last.folder]),
            reread_towers=lambda: fetch_towers(run.store, manifest.folder, towers_cache(), reread=True),
        )
        remember_stage(run.store, run.recipe.run, "export", exported.folder, exported.digest, exported.fields)
        run.report(Progress(1, 1, "folders"))
        return run.finish(
            manifest=f"{exported.folder}/MANIFEST.json",
            digest=exported.digest,
            skipped=exported.skipped,
            reason=NOTHING_TO_DO if exported.skipped else f"from {last.folder}",
            warnings=[f"{run.store.uri(exported.damaged)} was damaged: the folder is made again"]
            if exported.damaged
            else [],
            table=[{"folder": run.store.uri(exported.folder), "checkpoint": last.folder}],
        )
