"""Stage 7, evaluate: scores of every checkpoint, with live and EMA weights.

Paper section 5, App. B.3.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.scores import bench_rows, left_out_lines, score_notes, score_rows, shown_of, thumbnails
from sd3core.data.begun import begin, end
from sd3core.words import counted
from workers.evaluate import evaluate_stage
from workers.shard_stage import NOTHING_TO_DO


@flow(name="evaluate", **FLOW_OPTIONS)
def evaluate(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Validation loss, CLIP score, FID on CLIP features, ShapesBench where the world is the small one, and grids."""
    with stage("evaluate", recipe, overrides, remake) as run:
        checkpoints, inputs = run.upstream.to_be_scored()
        folder = f"runs/{run.recipe.run}/evaluations"
        digests = {"raw": inputs.raw.digest, "text": inputs.text.digest} | {
            key: ref.digest for key, ref in inputs.latents.items()
        }
        needs = [
            f"references/{run.recipe.data.name}",
            inputs.towers,
            *(path for paths in checkpoints.values() for path in paths),
        ]
        begin(run.store, run.recipe.run, "evaluate", folder, digests, needs)
        result = evaluate_stage(run.recipe, run.store, checkpoints, inputs, run.report)
        end(run.store, run.recipe.run, "evaluate", folder)
        return run.finish(
            manifest=result.path,
            digest=result.digest,
            skipped=result.skipped,
            reason=NOTHING_TO_DO
            if result.skipped
            else f"{result.made} of {counted(result.made + result.done_before, 'part')} not scored yet",
            table=score_rows(shown_of(result.scores, result.shown)),
            second_table=bench_rows(shown_of(result.bench, result.shown)),
            warnings=[
                *result.warnings,
                *left_out_lines(shown_of(result.scores, result.shown), shown_of(result.left_out, result.shown)),
                *score_notes(result.scores, result.protocols, result.shown),
            ],
            pictures=thumbnails(run.store, shown_of(result.pictures, result.shown)),
        )
