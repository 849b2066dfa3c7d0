"""What `sd3 inspect` prints and draws of what it found."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from flows.cli import inspect
from sd3core.inspection import Findings, ShownRow


def test_a_sheets_numbers_are_those_of_the_rows(tmp_path, monkeypatch):
    """A row whose picture cannot be shown has its number all the same."""
    rows = [ShownRow("a", {}, "no image"), ShownRow("b", {"text": "a leaf"}, np.zeros((8, 8, 3), np.uint8))]
    monkeypatch.setattr(inspect, "inspect_stored", lambda *_: Findings("a tar", rows=rows))
    drawn = []
    monkeypatch.setattr(inspect, "contact_sheet", lambda pictures: drawn.extend(pictures) or pictures[0][1])
    inspect.print_inspection("x.tar", 5, tmp_path / "sheet.png", Console(file=io.StringIO()))
    assert [(number, words) for number, _, words in drawn] == [(2, "a leaf")]
