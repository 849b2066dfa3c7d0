"""Stage 7, evaluate: scores of every checkpoint, with live and EMA weights.

Paper section 5, App. B.3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.scores import left_out_lines, score_notes, score_rows, shapes_bench_rows, shown_of, thumbnails
from workers.evaluate import evaluate_stage
from workers.evaluate_rises import rise_lines


@flow(name="evaluate", **FLOW_OPTIONS)
def evaluate(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """Validation loss, CLIP score, FID on CLIP features, ShapesBench where the world is the small one, and grids."""
    with stage("evaluate", recipe, overrides, remake) as run:
        result = evaluate_stage(run.recipe, run.store, run.upstream.to_be_scored(), run.report)
        made = run.store.get_json(result.path)
        shown = {name: shown_of(made[name], made["shown"]) for name in ("scores", "bench", "left_out", "pictures")}
        said = left_out_lines(shown["scores"], shown["left_out"])
        said += score_notes(made["scores"], made["protocols"], made["shown"])
        said += rise_lines(made.get("rising", ()), made["shown"])
        return run.finish(
            replace(result, notes=[*result.notes, *said]),
            [score_rows(shown["scores"]), shapes_bench_rows(shown["bench"])],
            thumbnails(run.store, shown["pictures"]),
        )
