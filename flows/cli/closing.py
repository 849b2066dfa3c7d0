"""Prints the end of a run: its stages, scores, pictures and the next command."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from flows.local.home import local_command
from flows.local.services import Services
from flows.summary import of_stage
from flows.ui.scores import score_rows, shapes_bench_rows, shown_of
from sd3core.comparison_grid import READING
from sd3core.data.provenance import Provenance
from sd3core.data.store import Store
from sd3core.files.local_paths import shown_place
from sd3core.recipe import Recipe
from sd3core.specs import evaluations_folder, summary_path
from workers.evaluate_tasks import COMPARISON

PICTURES_NAMED = 6
TASKS_PREFIX = "shapes_bench/"


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
    _print_scores(shapes_bench_rows(shown_of(summary["bench"], shown)), console)
    console.print()
    say = lambda label, text: console.print(f"{label:<10}{text}", soft_wrap=True, highlight=False)
    newest = {
        (picture["phase"], picture["name"]): picture
        for picture in shown_of(summary["pictures"], shown)
        if picture["weights"] == "ema"
    }
    for (phase, name), picture in [*newest.items()][-PICTURES_NAMED:]:
        say("pictures", f"{_shown(store, picture['path'])}  {phase} {_of_picture(name)}")
    say("all", _shown(store, evaluations_folder(recipe.run)))
    if summary["export"]:
        say("export", shown_place(summary["export"]))
    say("summary", _shown(store, summary_path(recipe.run)))
    for line in maker_lines(summary["stages"]):
        say("made by", line)
    say("UI", f"{services.ui_url}  (password: {local_command('sd3 ui')})")
    say("sample", " ".join(command))


def _of_picture(name: str) -> str:
    """What a picture shows, by the name that scores.json has for it: its size, or a comparison."""
    if name == COMPARISON:
        return READING
    height, _, width = name.partition("x")
    return f"{height if height == width else name} px"


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
