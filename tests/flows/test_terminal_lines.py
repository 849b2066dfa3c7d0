from __future__ import annotations

import io
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import StateType
from rich.console import Console

from flows import terminal
from flows.terminal import RunView, StageView, _LinePrinter, _problem, _table


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now.seconds)
    return now


def view(*stages: StageView) -> RunView:
    return RunView(StateType.RUNNING, "", list(stages))


def test_lines_for_changes_of_state_and_progress_now_and_then(clock):
    out = io.StringIO()
    printer = _LinePrinter(Console(file=out, width=20))
    shown = [
        (0, StageView("ingest", "running", 0, "")),
        (1, StageView("ingest", "running", 1, "8/96 rows")),  # too soon for progress
        (2, StageView("ingest", "running", 2, "16/96 rows")),
        (19, StageView("ingest", "running", 11, "48/96 rows, 4.4 rows/s, 11 s left")),  # due
        (1, StageView("ingest", "running", 12, "56/96 rows")),
        (25, StageView("ingest", "running", 27, "48/96 rows, 4.4 rows/s, 11 s left")),  # due, and nothing new
        (1, StageView("ingest", "done", 75, "96/96 rows")),
        (60, StageView("ingest", "done", 75, "96/96 rows")),
    ]
    for seconds, stage in shown:
        clock.seconds += seconds
        printer.show(view(stage))
    assert out.getvalue().splitlines() == [  # and no line is broken, however narrow the log
        "ingest: running, 0 s",
        "ingest: running, 11 s  48/96 rows, 4.4 rows/s, 11 s left",
        "ingest: done, 1 min 15 s  96/96 rows",
    ]


def test_stages_are_told_apart(clock):
    out = io.StringIO()
    printer = _LinePrinter(Console(file=out))
    printer.show(view(StageView("ingest", "done", 1, "")))
    printer.show(view(StageView("ingest", "done", 1, ""), StageView("towers", "running", 0, "")))
    assert out.getvalue().splitlines() == ["ingest: done, 1 s", "towers: running, 0 s"]


def test_the_table_of_a_pipeline_shows_what_is_to_come():
    out = io.StringIO()
    Console(file=out, width=100).print(
        _table(view(StageView("ingest", "done", 1, ""), StageView("towers", "running", 3, "1/24 steps")))
    )
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert [row[0] for row in rows[1:]] == [
        "ingest",
        "towers",
        "caption",
        "encode",
        "pretrain",
        "finetune",
        "evaluate",
        "export",
    ]
    assert rows[2][:2] == ["towers", "running"]
    assert rows[3] == ["caption", "waiting"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "Flow run encountered an exception: sd3core.errors.DataError: raw: no such folder\nmore",
            "raw: no such folder",
        ),
        ("Flow run encountered an exception: StageFailed: text: 1 of 3 shards", "text: 1 of 3 shards"),
        ("Flow run encountered an exception: KeyError: 'uri'", "'uri'"),
        (
            "Its process is gone. Run the same deployment again: it goes on.",
            "Its process is gone. Run the same deployment again: it goes on.",
        ),
        (None, "Failed"),
    ],
)
def test_the_problem_of_a_failed_run_in_its_own_words(message, shown):
    run = SimpleNamespace(
        id=uuid4(), state_type=StateType.FAILED, state=SimpleNamespace(message=message, name="Failed")
    )
    assert _problem(run) == shown


def test_a_run_that_is_well_has_no_problem():
    assert (
        _problem(SimpleNamespace(state_type=StateType.RUNNING, state=SimpleNamespace(message="hello", name="Running")))
        == ""
    )
