"""Rate and time left, with a clock that the test turns."""

from __future__ import annotations

import pytest

from sd3core.progress import Progress, ProgressMeter, counted, format_seconds


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sd3core.progress.time.monotonic", lambda: now[0])
    return now


def test_neither_starting_nor_earlier_work_counts_for_the_rate(clock):
    seen: list[Progress] = []
    meter = ProgressMeter(100, "rows", seen.append, already_done=40)
    clock[0] += 50  # workers start
    meter.advance(10)
    assert (seen[-1].done, seen[-1].rate, seen[-1].seconds_left) == (50, None, None)
    clock[0] += 2
    meter.advance(20)
    assert (seen[-1].rate, seen[-1].seconds_left) == (10.0, 3.0)


def test_line_says_what_a_person_wants_to_know():
    assert Progress(5, 10, "rows", "shard 1", 2.5, 2.0).line() == "5/10 rows, 2.5 rows/s, 2 s left, shard 1"
    assert Progress(10, 10, "rows", rate=2.5, seconds_left=0.0).line() == "10/10 rows, 2.5 rows/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")])
def test_seconds_for_people(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_counts_for_people(number, text):
    assert counted(number, "row") == text
