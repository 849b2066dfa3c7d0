"""Plots that people look at, as small PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

SMOOTHING_ROWS = 25


def loss_curve(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """The loss over samples seen: every step in `rows`, and their running mean from where there are enough. `rows`: metrics with `samples` and `loss`."""
    from matplotlib.figure import Figure  # without pyplot: no global state, works in any thread

    logged = [(row["samples"], row["loss"]) for row in rows if row.get("loss") is not None]
    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    if logged:
        samples, losses = zip(*logged, strict=True)
        axes.plot(samples, losses, linewidth=0.5, alpha=0.4, label="single steps")
        if len(losses) >= SMOOTHING_ROWS:
            means = _running_mean(losses, SMOOTHING_ROWS)
            axes.plot(samples[SMOOTHING_ROWS - 1 :], means, linewidth=1.5, label=f"mean of the last {SMOOTHING_ROWS}")
        axes.legend(loc="upper right")
    axes.set(title=title, xlabel="samples seen", ylabel="loss (velocity MSE)")
    axes.grid(alpha=0.3)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of every `width` values that follow each other: one for the last `width`, and for each before it, down to the first."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()
