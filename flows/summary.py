"""runs/RUN/summary.json: what the last pipeline run did, and the scores. The terminal's closing words are made from it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from sd3core.data.provenance import provenance, provenance_of
from sd3core.data.store import Store
from sd3core.errors import StoreError
from sd3core.recipe import Recipe
from sd3core.specs import RUNS, summary_path


def of_stage(stage: str, words: str) -> str:
    """Words with their stage before them, once: a training phase's own begin with it."""
    return words if words.startswith((f"{stage}:", f"{stage}.")) else f"{stage}: {words}"


def exported_folder(recipe: Recipe, export: dict[str, Any]) -> str | None:
    """Where the export stage's manifest is; None of a model for which it makes none and names the checkpoint."""
    if recipe.export_problem():
        return None
    return export["manifest"].rpartition("/")[0]


def finished_runs(store: Store) -> dict[str, str]:
    """Run -> recipe, of the pipeline runs that this store has to their end."""
    runs = {}
    for entry in store.list(RUNS):
        if re.fullmatch(summary_path("[^/]+"), entry.path):
            with suppress(StoreError, KeyError, TypeError):  # a damaged one tells of no run, and stops no other
                summary = store.get_json(entry.path)
                runs[summary["run"]] = summary["recipe"]
    return runs


def write_summary(
    store: Store,
    recipe: Recipe,
    stages: list[dict[str, Any]],
    scores: dict[str, Any],
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """`stages`: name, manifest, digest, seconds, state (done or skipped), reason. `scores`: as in evaluations/scores.json."""
    summary = {
        "recipe": recipe.name,
        "run": recipe.run,
        "overrides": overrides or [],
        "made_by": provenance().model_dump(mode="json", exclude_none=True),
        "stages": [stage | {"made_by": _makers(store, stage["manifest"])} for stage in stages],
        "scores": scores["scores"],
        "bench": scores["bench"],
        "left_out": scores["left_out"],
        "pictures": scores["pictures"],
        "protocols": scores.get("protocols", {}),
        "shown": scores.get("shown"),
        "rising": scores.get("rising", []),
        "export": exported_folder(recipe, stages[-1]),
    }
    store.put_json(summary_path(recipe.run), summary)
    return summary


def _makers(store: Store, manifest: str) -> list[dict[str, Any]]:
    found = provenance_of(store, manifest.removeprefix(f"{store.url}/"))
    return [maker.model_dump(mode="json", exclude_none=True) for maker in found]
