"""runs/RUN/summary.json: what the last pipeline run did, and the scores. The terminal's closing words are made from it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.home import pasted
from flows.scores import bench_rows, score_rows, shown_of
from flows.services import Services
from sd3core.data.store import Store
from sd3core.local_paths import shown_place
from sd3core.provenance import Provenance, provenance, provenance_of
from sd3core.errors import StoreError
from sd3core.recipe import Recipe

PICTURES_NAMED = 6
TASKS_PREFIX = "shapes_bench/"


def of_stage(stage: str, words: str) -> str:
    """Words with their stage before them, once: a training phase's own begin with it."""
    return words if words.startswith((f"{stage}:", f"{stage}.")) else f"{stage}: {words}"


def summary_path(recipe: Recipe) -> str:
    return f"runs/{recipe.run}/summary.json"


def exported_folder(recipe: Recipe, export: dict[str, Any]) -> str | None:
    """Where the export stage's manifest is; None of a model for which it makes none and names the checkpoint."""
    if recipe.export_problem():
        return None
    return export["manifest"].rpartition("/")[0]


def finished_runs(store: Store) -> dict[str, str]:
    """Run -> recipe, of the pipeline runs that this store has to their end."""
    runs = {}
    for entry in store.list("runs"):
        if re.fullmatch("runs/[^/]+/summary.json", entry.path):
            with suppress(StoreError, KeyError, TypeError):  # a damaged one tells of no run, and stops no other
                summary = store.get_json(entry.path)
                runs[summary["run"]] = summary["recipe"]
    return runs


def write_summary(
    store: Store, recipe: Recipe, stages: list[dict[str, Any]], scores: dict[str, Any], overrides: list[str] | None = None
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
        "export": exported_folder(recipe, stages[-1]),
    }
    store.put_json(summary_path(recipe), summary)
    return summary


def _makers(store: Store, manifest: str) -> list[dict[str, Any]]:
    found = provenance_of(store, manifest.removeprefix(f"{store.url}/"))
    return [maker.model_dump(mode="json", exclude_none=True) for maker in found]


def maker_lines(stages: list[dict[str, Any]]) -> list[str]:
    """A line for each version, lock and kind of machine that made something of this run, with its stages."""
    stages_of: dict[str, list[str]] = {}
    for stage in stages:
        for maker in stage.get("made_by", []):
            stages_of.setdefault(Provenance.model_validate(maker).line(), []).append(stage["name"])
    return [f"{line} ({', '.join(dict.fromkeys(names))})" for line, names in stages_of.items()]


def print_summary(
    summary: dict[str, Any], store: Store, recipe: Recipe, services: Services, console: Console, command: list[str]
) -> None:
    """Where the pictures are, the scores, the UI, the command that samples."""
    _print_stages(summary["stages"], console)
    for stage in summary["stages"]:
        for warning in stage["warnings"]:
            console.print(of_stage(stage["name"], warning), soft_wrap=True, highlight=False)
    shown = summary.get("shown")
    _print_scores(score_rows(shown_of(summary["scores"], shown)), console)
    _print_scores(bench_rows(shown_of(summary["bench"], shown)), console)
    console.print()
    say = lambda label, text: console.print(f"{label:<10}{text}", soft_wrap=True, highlight=False)  # noqa: E731
    newest = {(picture["phase"], picture["name"]): picture for picture in shown_of(summary["pictures"], shown) if picture["weights"] == "ema"}
    for (phase, size), picture in [*newest.items()][-PICTURES_NAMED:]:
        height, _, width = size.partition("x")
        say("pictures", f"{_shown(store, picture['path'])}  {phase} {height if height == width else size} px")
    say("all", _shown(store, f"runs/{recipe.run}/evaluations"))
    if summary["export"]:
        say("export", shown_place(summary["export"]))
    say("summary", _shown(store, summary_path(recipe)))
    for line in maker_lines(summary["stages"]):
        say("made by", line)
    say("UI", f"{services.ui_url}  (password: {pasted('sd3 ui')})")
    say("sample", " ".join(command))


def _shown(store: Store, path: str) -> str:
    """A path a person can open: of this machine where the store is a folder."""
    return shown_place(store.uri(path))


def _print_stages(stages: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "seconds", "manifest", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in stages:
        table.add_row(stage["name"], stage["state"], f"{stage['seconds']:.1f}", stage["digest"][:12], stage["reason"])
    console.print(table)


def _print_scores(rows: list[dict[str, object]], console: Console) -> None:
    if not rows:
        return
    console.print()
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(
            column.removeprefix(TASKS_PREFIX).replace("_", " "),
            justify="left" if column in ("phase", "weights", "task") else "right",
        )
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
