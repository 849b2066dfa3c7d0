"""Scores as tables: a row for each checkpoint and kind of weights, a column for each metric."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from sd3core.data.store import Store

PICTURES_SHOWN = 6


def score_rows(scores: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Long rows (one a metric) into wide ones, in the order they come; a score that was left out is a dash."""
    metrics = list(dict.fromkeys(row["metric"] for row in scores))
    wide: dict[tuple[Any, ...], dict[str, object]] = {}
    for row in scores:
        place = (row["phase"], row["samples"], row["weights"])
        fixed = {"phase": row["phase"], "samples": f"{row['samples']:,}", "weights": row["weights"]}
        entry = wide.setdefault(place, {**fixed, **{metric: "-" for metric in metrics}})
        entry[row["metric"]] = f"{row['value']:.3f}"
    return list(wide.values())


def bench_rows(tasks: list[dict[str, Any]]) -> list[dict[str, object]]:
    """ShapesBench of the newest EMA weights: a row a task, right pictures of all and by kind and size, beside what chance gives."""
    ema = [row for row in tasks if row["weights"] == "ema"]
    newest = [row for row in ema if row["checkpoint"] == ema[-1]["checkpoint"]]
    if not newest:
        return []
    tallies = {
        "right": [row["all"] for row in newest],
        "seen combinations": [row["seen"] for row in newest],
        "unseen": [row["unseen"] for row in newest],
    }
    sizes = newest[0]["sizes"]
    if len(sizes) > 1:  # height x width
        tallies |= {f"{size} px": [row["sizes"][size] for row in newest] for size in sizes}
    rows = [
        {"task": row["task"]}
        | {column: _share(of_tasks[place]) for column, of_tasks in tallies.items()}
        | {"chance": f"{row['chance']:.3f}"}
        for place, row in enumerate(newest)
    ]
    means = {column: _mean_share(of_tasks) for column, of_tasks in tallies.items()}
    chance = fmean(row["chance"] for row in newest)
    return [*rows, {"task": "mean of the tasks"} | means | {"chance": f"{chance:.3f}"}]


def left_out_lines(scores: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> list[str]:
    """What is left out and why; where there is no score at all one line says it, by the reason of the plainest."""
    found = {(row["metric"], row["reason"]) for row in left_out}
    plainest = {("every score", reason) for metric, reason in found if metric == "validation_loss"}
    if plainest and not scores:
        found = plainest | {(metric, reason) for metric, reason in found if metric == "grid"}
    return sorted(f"{metric} is left out: {reason}" for metric, reason in found)


def _mean_share(tallies: list[dict[str, int]]) -> str:
    shares = [tally["right"] / tally["pictures"] for tally in tallies if tally["pictures"]]
    return f"{fmean(shares):.3f}" if shares else "-"


def _share(tally: dict[str, int]) -> str:
    """"0.900 (54 of 60)"; a dash where the task has no such prompt."""
    right, pictures = tally["right"], tally["pictures"]
    return f"{right / pictures:.3f} ({right} of {pictures})" if pictures else "-"


def thumbnails(store: Store, pictures: list[dict[str, Any]]) -> dict[str, bytes]:
    """The newest EMA grids, small enough to stand in the UI."""
    newest = [picture for picture in pictures if picture["weights"] == "ema"][-PICTURES_SHOWN:]
    return {f"{p['name']}, {p['phase']}, {p['samples']:,} samples": store.get(p["thumbnail"]) for p in newest}
