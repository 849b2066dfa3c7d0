"""Rate and time left, with a clock that the test turns."""

from __future__ import annotations

import pytest

from sd3core.progress import Progress, ProgressMeter
from sd3core.words import counted, format_seconds


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


def test_the_rate_is_that_of_the_last_minute_and_at_the_end_that_of_all(clock):
    seen: list[Progress] = []
    meter = ProgressMeter(1000, "rows", seen.append)
    for _ in range(200):
        clock[0] += 1
        meter.advance(4)
    assert seen[-1].rate == 4.0 and seen[-1].seconds_left == 50.0
    for _ in range(90):  # now at a quarter of the pace
        clock[0] += 1
        meter.advance(1)
    assert seen[-1].rate == 1.0 and seen[-1].seconds_left == 110.0
    clock[0] += 600  # nothing comes any more
    meter.update(meter.done, "no word")
    assert seen[-1].rate < 0.01
    clock[0] += 10
    meter.advance(110)
    assert seen[-1].rate == (1000 - 4) / (199 + 90 + 610) and seen[-1].seconds_left == 0


def test_work_that_goes_back_has_a_rate_again_at_once(clock):
    seen: list[Progress] = []
    meter = ProgressMeter(100, "samples", seen.append)
    for done in (30, 40, 20, 25):
        clock[0] += 1
        meter.update(done)
    assert [progress.rate for progress in seen] == [None, 10.0, None, 5.0]


def test_units_that_take_minutes_have_a_rate(clock):
    seen: list[Progress] = []
    meter = ProgressMeter(20, "shards", seen.append)
    for _ in range(9):
        clock[0] += 300
        meter.advance()
    clock[0] += 100
    meter.update(meter.done)
    assert seen[-2].rate == 1 / 300 and seen[-1].rate == 4 / 1300


def test_line_says_what_a_person_wants_to_know():
    assert Progress(5, 10, "rows", "shard 1", 2.5, 2.0).line() == "5/10 rows, 2.5 rows/s, 2 s left, shard 1"
    assert Progress(10, 10, "rows", rate=2.5, seconds_left=0.0).line() == "10/10 rows, 2.5 rows/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")])
def test_seconds_for_people(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_counts_for_people(number, text):
    assert counted(number, "row") == text
