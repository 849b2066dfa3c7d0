"""runs/RUN/summary.json: what the last pipeline run did, and the scores. The terminal's closing words are made from it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sd3core.data.store import Store
from sd3core.recipe import Recipe


def summary_path(recipe: Recipe) -> str:
    return f"runs/{recipe.run}/summary.json"


def write_summary(store: Store, recipe: Recipe, stages: list[dict[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
    """`stages`: name, manifest, digest, seconds, state (done or skipped), reason. `scores`: see workers.evaluate."""
    summary = {
        "recipe": recipe.name,
        "run": recipe.run,
        "stages": stages,
        "scores": scores["scores"],
        "left_out": scores["left_out"],
        "pictures": scores["pictures"],
        "export": stages[-1]["manifest"],
    }
    store.put_json(summary_path(recipe), summary)
    return summary
