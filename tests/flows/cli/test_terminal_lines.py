from __future__ import annotations

import io
import re
from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import httpx
import numpy as np
import pytest
from prefect.client.schemas.objects import StateType
from rich.console import Console

from flows.cli import terminal
from flows.cli.terminal import (
    RunView,
    ShownPicture,
    StageView,
    _LinePrinter,
    _picture,
    _problem,
    _screen,
    _stage_view,
    _table,
)
from flows.cli.terminal_picture import half_blocks
from flows.local.services import ServiceError
from flows.ui.artifacts import markdown_picture
from sd3core.pictures import encode_png
from sd3core.specs import ONLY_WHERE_ASKED, STAGES


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


def test_the_table_has_all_stages_from_the_pipelines_first_and_a_stage_on_its_own_alone():
    first = [StageView("ingest", "running", 1, "")]
    assert _table(RunView(StateType.RUNNING, "", first)).row_count == len(STAGES) - len(ONLY_WHERE_ASKED)
    assert _table(RunView(StateType.RUNNING, "", first, pipeline=False)).row_count == 1


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "Flow run encountered an exception: sd3core.errors.DataError: raw: no such folder\nmore",
            "raw: no such folder",
        ),
        ("Flow run encountered an exception: StageFailed: text: 1 of 3 shards", "text: 1 of 3 shards"),
        ("Flow run encountered an exception: KeyError: 'uri'", "KeyError: 'uri'"),
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


def picture_file(*rows: list[tuple[int, int, int]]) -> bytes:
    return encode_png(np.array(rows, dtype=np.uint8))


def test_a_picture_as_half_blocks():
    """Two rows of pixels are one row of characters: the upper one in front, the lower one behind."""
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    text = half_blocks(picture_file([red, green], [blue, white]), columns=80, rows=20)
    assert text.plain == "▀▀\n"
    shown = [(span.style.color.triplet, span.style.bgcolor.triplet) for span in text.spans]
    assert shown == [(red, blue), (green, white)]


@pytest.mark.parametrize(("columns", "rows", "shown"), [(80, 20, (16, 4)), (8, 20, (8, 2)), (80, 1, (4, 1))])
def test_a_picture_keeps_its_shape_and_is_never_enlarged(columns, rows, shown):
    lines = half_blocks(picture_file(*[[(1, 2, 3)] * 16] * 8), columns, rows).plain.split()
    assert (len(lines[0]), len(lines)) == shown


def screen(picture: bytes | None, reading: str = "", **options) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, **options)
    shown = RunView(StateType.RUNNING, "", [])
    console.print(_screen(shown, ShownPicture("/p.png", picture, reading) if picture else None, console))
    return console.file.getvalue()


def test_what_a_picture_shows_where_stands_below_it():
    picture = picture_file(*[[(200, 20, 20)] * 32] * 32)
    shown = screen(picture, "left: trained on\x1b[31m", color_system="truecolor", height=24)
    assert shown.count("▀") == 22 * 11  # a line less for it
    assert "left: trained on\\x1b[31m" in shown


def test_the_newest_picture_stands_below_the_table_where_there_are_colours_and_room():
    picture = picture_file(*[[(200, 20, 20)] * 32] * 32)
    assert screen(picture, color_system="truecolor", height=24).count("▀") == 24 * 12  # 24 lines, 8 stages, 4 beside
    for options in (
        {"color_system": "truecolor", "height": 16},
        {"color_system": "standard", "height": 24},
        {"color_system": None, "height": 24},
        {"color_system": "truecolor", "height": 24, "no_color": True},
    ):
        assert "▀" not in screen(picture, **options)
    assert "▀" not in screen(None, color_system="truecolor", height=24)


@pytest.fixture
def server(monkeypatch, clock):
    """What it would answer: `look` to every look at a run, `pictures` to one after the other for the newest (then none any more).
    `fetched`: when those were asked for, in seconds."""
    answers = SimpleNamespace(look=None, pictures=[], fetched=[])

    def newest_picture(run):
        answers.fetched.append(clock.seconds - 1000)
        return answers.pictures.pop(0) if answers.pictures else None

    def sleep(seconds):
        clock.seconds += seconds

    monkeypatch.setattr(terminal, "fail_dead_runs", list)
    monkeypatch.setattr(terminal, "view_run", lambda run: answers.look(run))
    monkeypatch.setattr(terminal, "newest_picture", newest_picture)
    monkeypatch.setattr(terminal.time, "sleep", sleep)
    return answers


def pretraining(*states: StateType):
    """Looks at a run that is in these states."""
    views = [RunView(state, "", [StageView("pretrain", "running", 1, "")]) for state in states]
    return lambda run: views.pop(0)


COLOURFUL = {"force_terminal": True, "color_system": "truecolor", "height": 40}


@pytest.mark.parametrize("kind", [{}, COLOURFUL])
def test_the_path_of_the_first_picture_is_printed_once(server, kind):
    picture = picture_file([(1, 2, 3)], [(1, 2, 3)])
    server.look = pretraining(StateType.RUNNING, StateType.RUNNING, StateType.COMPLETED)
    server.pictures = [None, ShownPicture("/store/a.png", picture), ShownPicture("/store/b.png", picture)]
    out = io.StringIO()
    terminal.follow(uuid4(), Console(file=out, width=60, **kind))
    assert out.getvalue().count("first pictures: /store/a.png") == 1 and "b.png" not in out.getvalue()
    assert ("▀" in out.getvalue()) == bool(kind)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1", "TERM": "xterm"}])
def test_a_terminal_that_cannot_or_shall_not_show_colours(server, variables):
    """Lines where it cannot move its cursor, a table that is drawn anew where it can; no colour, and no picture made of it."""
    server.look = pretraining(StateType.RUNNING, StateType.COMPLETED)
    server.pictures = [ShownPicture("/store/a.png", picture_file([(1, 2, 3)], [(1, 2, 3)]))]
    out = io.StringIO()
    terminal.follow(uuid4(), Console(file=out, width=60, height=40, force_terminal=True, _environ=variables))
    shown = out.getvalue()
    assert "first pictures: /store/a.png" in shown and "▀" not in shown
    assert not re.search(r"\x1b\[[\d;]*(?:3|4|9)\d[\d;]*m", shown)  # a colour
    assert ("\x1b" in shown) == (variables["TERM"] != "dumb")


@pytest.mark.parametrize("kind", [{}, COLOURFUL])
def test_a_warning_is_printed_once_and_as_it_comes(server, kind):
    lost = "pretrain: a rank was lost; went on from 3,000 samples"
    views = [
        RunView(state, "", [StageView("pretrain", "running", 1, "", warnings)])
        for state, warnings in [
            (StateType.RUNNING, ()),
            (StateType.RUNNING, (lost,)),
            (StateType.COMPLETED, (lost, "a.png cannot be shown")),
        ]
    ]
    server.look = lambda run: views.pop(0)
    out = io.StringIO()
    terminal.follow(uuid4(), Console(file=out, width=100, **kind))
    assert out.getvalue().count(f"warning: {lost}\n") == 1
    assert out.getvalue().count("warning: pretrain: a.png cannot be shown\n") == 1


@pytest.mark.parametrize(
    ("state", "described", "shown"),
    [
        (StateType.COMPLETED, "skipped: finished before", ("skipped", "finished before", ())),
        (StateType.RUNNING, "skipped: finished before", ("skipped", "finished before", ())),  # told before it has ended
        (StateType.COMPLETED, "4/4 steps\none\ntwo", ("done", "4/4 steps", ("one", "two"))),
        (StateType.RUNNING, "", ("running", "", ())),
    ],
)
def test_a_stage_by_its_state_and_what_its_progress_says(state, described, shown):
    run = SimpleNamespace(state_type=state, state=None, estimated_run_time=timedelta(seconds=2))
    view = _stage_view(run, "pretrain", described)
    assert (view.state, view.progress, view.warnings) == shown


@pytest.mark.parametrize(("kind", "fetched"), [({}, [0, 2, 4]), (COLOURFUL, [0, 2, 4, 14, 24, 28])])
def test_a_picture_is_fetched_until_there_is_one_then_now_and_then_where_it_can_be_shown(server, kind, fetched):
    """Every two seconds, every ten, and once more at the end."""
    picture = ShownPicture("/store/a.png", picture_file([(1, 2, 3)], [(1, 2, 3)]))
    server.look = pretraining(*[StateType.RUNNING] * 14, StateType.COMPLETED)
    server.pictures = [None, None, picture]
    out = io.StringIO()
    terminal.follow(uuid4(), Console(file=out, width=60, **kind))
    assert server.fetched == fetched
    last_screen = out.getvalue().rpartition("progress")[2]
    assert ("▀" in last_screen) == bool(kind)  # the last one found stays


def test_a_picture_is_found_in_its_artifact():
    image = picture_file([(1, 2, 3)], [(4, 5, 6)])
    artifact = {
        "data": f"## after 64 samples\n\n{markdown_picture('grid', image)}\n\n1. a",
        "description": "/store/a.png",
    }
    assert _picture([artifact]) == ShownPicture("/store/a.png", image, "grid")
    assert _picture([]) is None and _picture([{"data": "no picture", "description": ""}]) is None


def test_a_run_that_is_well_has_no_problem():
    assert (
        _problem(SimpleNamespace(state_type=StateType.RUNNING, state=SimpleNamespace(message="hello", name="Running")))
        == ""
    )


@pytest.mark.parametrize("state", [StateType.SCHEDULED, StateType.PENDING])
def test_a_run_that_waits_for_a_dead_worker_says_so(monkeypatch, server, state):
    server.look = lambda run: RunView(state, "", [])
    monkeypatch.setattr(terminal, "worker_lives", lambda: False)
    with pytest.raises(
        ServiceError, match="worker has ended before it began the run; the same command goes on with it$"
    ):
        terminal.follow(uuid4(), Console(file=io.StringIO()))


def test_a_server_that_stays_away_is_an_error_of_one_line(server, clock):
    def away(run):
        clock.seconds += 20
        raise httpx.ConnectError("refused")

    server.look = away
    with pytest.raises(ServiceError, match="away for a minute; the same command starts it and goes on$"):
        terminal.follow(uuid4(), Console(file=io.StringIO()))
    assert clock.seconds >= 1060
