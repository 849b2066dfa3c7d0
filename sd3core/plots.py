"""Plots that people look at, as small PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

SMOOTHING_ROWS = 25


def loss_curve(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """The loss over samples seen: every step in `rows`, and their running mean where there are enough. `rows`: metrics with `samples` and `loss`."""
    from matplotlib.figure import Figure  # without pyplot: no global state, works in any thread

    logged = [(row["samples"], row["loss"]) for row in rows if row.get("loss") is not None]
    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    if logged:
        samples, losses = zip(*logged, strict=True)
        axes.plot(samples, losses, linewidth=0.5, alpha=0.4, label="single steps")
        if len(losses) >= SMOOTHING_ROWS:
            axes.plot(
                samples, _running_mean(losses, SMOOTHING_ROWS), linewidth=1.5, label=f"mean of {SMOOTHING_ROWS} of them"
            )
        axes.legend(loc="upper right")
    axes.set(title=title, xlabel="samples seen", ylabel="loss (velocity MSE)")
    axes.grid(alpha=0.3)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place (of fewer at the start)."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means
