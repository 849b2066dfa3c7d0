from __future__ import annotations

import matplotlib.axes
import pytest

from flows.ui import loss_curve as plots


@pytest.fixture
def drawn(monkeypatch):
    """(x, y) of every line that is drawn."""
    lines = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, x, y, **how: lines.append((list(x), list(y))) or plot(self, x, y, **how),
    )
    return lines


@pytest.mark.parametrize(
    ("rows", "means"), [(0, 0), (plots.SMOOTHING_ROWS - 1, 0), (plots.SMOOTHING_ROWS, 1), (60, 36)]
)
def test_the_running_mean_begins_where_it_has_all_its_rows(drawn, rows, means):
    """Over a line of losses the mean lies half a window behind, from its first point on."""
    curve = [{"samples": 8 * n, "loss": 5.0 - n} for n in range(rows)]
    assert plots.loss_curve([*curve, {"samples": 8 * rows, "loss": None}], "pretrain").startswith(b"\x89PNG")
    assert len(drawn) == (rows > 0) + (means > 0)
    if means:
        samples, values = drawn[1]
        first = plots.SMOOTHING_ROWS - 1
        assert samples == [8 * n for n in range(first, rows)] and len(values) == means
        assert values == pytest.approx([5.0 - n + first / 2 for n in range(first, rows)])
