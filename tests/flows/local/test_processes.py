from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from flows.local.processes import Process, find_process, stop_tree


def test_a_process_lives_until_it_ends(child):
    process = Process.of(child.pid)
    assert process.alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for: a zombie is not alive
    assert not process.alive()
    child.wait()
    assert not process.alive()
    with pytest.raises(psutil.NoSuchProcess):
        Process.of(child.pid)


def test_a_number_used_again_is_another_process():
    mine = Process.of(os.getpid())
    assert mine.alive()
    assert not Process(mine.pid, mine.start - 1, mine.boot).alive()
    assert not Process(mine.pid, mine.start, "another start of the machine").alive()


def test_a_clock_that_is_set_ends_no_process(monkeypatch):
    """The time of day at which a process began is reckoned from the clock, and moves with it."""
    mine = Process.of(os.getpid())
    began = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began + 3600)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert mine.alive() and Process.of(os.getpid()) == mine


def test_the_birth_is_read_behind_any_name(tmp_path):
    """A program's name stands in the same line, in brackets that it may hold itself."""
    program = tmp_path / ") S 1 (x"
    shutil.copy(shutil.which("sleep"), program)
    with subprocess.Popen([program, "60"]) as started:
        ticks = os.sysconf("SC_CLK_TCK")
        assert Process.of(started.pid).start / ticks == psutil.Process(started.pid)._proc.create_time(monotonic=True)
        started.kill()


def test_records_of_both_versions_are_read(child):
    process = Process.of(child.pid)
    assert Process.from_record({"pid": process.pid, "start": process.start, "boot": process.boot, "more": 1}) == process
    began = psutil.Process(child.pid).create_time()
    assert Process.from_record({"pid": child.pid, "born": began}) == process
    assert not Process.from_record({"pid": child.pid, "born": began - 100}).alive()


@pytest.mark.parametrize(
    "record", [None, [], "", {}, {"pid": 1}, {"pid": "1", "start": 2, "boot": ""}, {"pid": 1, "born": "x"}]
)
def test_what_is_no_record_is_told(record):
    with pytest.raises(ValueError, match="is no record of a process$"):
        Process.from_record(record)


def test_a_process_is_found_by_how_it_was_started(tmp_path):
    arguments = ["-c", "import time; time.sleep(60)", str(tmp_path)]
    assert find_process(arguments) is None
    with subprocess.Popen([sys.executable, *arguments, "more"], env=dict(os.environ, SD3_HOME="/a")) as started:
        while not psutil.Process(started.pid).cmdline()[1:]:
            time.sleep(0.01)
        assert find_process(arguments, SD3_HOME="/a") == Process.of(started.pid)
        assert find_process(arguments, SD3_HOME="/b") is None
        started.kill()


def test_stopping_ends_the_descendants_too():
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        grandchild = Process.of(int(parent.stdout.readline()))
        assert grandchild.alive()
        stop_tree(Process.of(parent.pid))
    assert not grandchild.alive()


def test_another_process_with_the_number_is_not_stopped(child):
    process = Process.of(child.pid)
    stop_tree(Process(process.pid, process.start - 1, process.boot))
    assert process.alive()
