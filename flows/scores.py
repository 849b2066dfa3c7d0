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


def thumbnails(store: Store, pictures: list[dict[str, Any]]) -> dict[str, bytes]:
    """The newest EMA grids, small enough to stand in the UI."""
    newest = [picture for picture in pictures if picture["weights"] == "ema"][-PICTURES_SHOWN:]
    return {f"{p['name']}, {p['phase']}, {p['samples']:,} samples": store.get(p["thumbnail"]) for p in newest}
