"""Scores as tables: a row for each checkpoint and kind of weights, a column for each metric."""

from __future__ import annotations

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
    """ShapesBench of the newest EMA weights: a row a task, right pictures of all, beside what chance gives."""
    ema = [row for row in tasks if row["weights"] == "ema"]
    newest = [row for row in ema if row["checkpoint"] == ema[-1]["checkpoint"]]
    rows: list[dict[str, object]] = [
        {
            "task": row["task"],
            "right": _share(row["all"]),
            "seen combinations": _share(row["seen"]),
            "unseen": _share(row["unseen"]),
            "chance": f"{row['chance']:.3f}",
        }
        for row in newest
    ]
    if newest:
        kinds = {"right": "all", "seen combinations": "seen", "unseen": "unseen"}
        shares = {column: [row[kind] for row in newest if row[kind]["pictures"]] for column, kind in kinds.items()}
        overall = {
            column: f"{sum(tally['right'] / tally['pictures'] for tally in tallies) / len(tallies):.3f}" if tallies else "-"
            for column, tallies in shares.items()
        }
        chance = sum(row["chance"] for row in newest) / len(newest)
        rows.append({"task": "mean of the tasks"} | overall | {"chance": f"{chance:.3f}"})
    return rows


def _share(tally: dict[str, int]) -> str:
    """"0.900 (54 of 60)"; a dash where the task has no such prompt."""
    right, pictures = tally["right"], tally["pictures"]
    return f"{right / pictures:.3f} ({right} of {pictures})" if pictures else "-"


def thumbnails(store: Store, pictures: list[dict[str, Any]]) -> dict[str, bytes]:
    """The newest EMA grids, small enough to stand in the UI."""
    newest = [picture for picture in pictures if picture["weights"] == "ema"][-PICTURES_SHOWN:]
    return {f"{p['name']}, {p['phase']}, {p['samples']:,} samples": store.get(p["thumbnail"]) for p in newest}
