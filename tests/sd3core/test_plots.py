from __future__ import annotations

import pytest

from sd3core import plots


@pytest.mark.parametrize(("rows", "means"), [(plots.SMOOTHING_ROWS - 1, 0), (plots.SMOOTHING_ROWS, 1)])
def test_a_mean_of_more_rows_than_there_are_is_not_drawn(monkeypatch, rows, means):
    drawn = []
    monkeypatch.setattr(plots, "_running_mean", lambda values, width: drawn.append(width) or values)
    assert plots.loss_curve([{"samples": n, "loss": 1.0} for n in range(rows)], "pretrain").startswith(b"\x89PNG")
    assert len(drawn) == means
