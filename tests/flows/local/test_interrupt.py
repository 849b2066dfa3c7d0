"""Ctrl-C is one line and exit code 130; what must be written down is, and what is being ended is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from uuid import uuid4

import pytest
from rich.console import Console

from flows import cli
from flows import session as sessions
from flows.cli import commands, demo
from flows.local import runs, services
from flows.local.interrupt import Interrupted, listen, put_off, unheard
from flows.local.services import Services
from sd3core.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def own_home_and_signals(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    listen()
    yield
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def test_a_command_ends_with_one_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sd3", "plan"])
    monkeypatch.setattr(commands, "_load", lambda *_: press())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "sd3: stopped; what was finished stays, and nothing that it started is left running\n")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the process without a traceback


def test_put_off_is_heard_at_the_end():
    reached = []
    with pytest.raises(Interrupted), put_off():
        press()
        press()
        reached.append(True)
    assert reached
    with put_off():
        pass


def test_what_it_leaves_is_said_as_it_is():
    listen("stopped; the services stay")
    with pytest.raises(Interrupted, match="^stopped; the services stay$"):
        press()


def test_unheard_is_not_heard():
    with unheard():
        press()
    with pytest.raises(Interrupted):
        press()


@pytest.mark.parametrize("interrupted", ["the Prefect server", "the Prefect worker"])
def test_services_that_were_being_started_are_stopped(monkeypatch, tmp_path, interrupted):
    spawned = []

    def spawn(*_):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        spawned.append(services.Process.of(child.pid))
        return spawned[-1]

    def start(found, say):
        services._start_server(found, say)
        services._start_worker(found, say)

    monkeypatch.setattr(services, "_spawn", spawn)
    monkeypatch.setattr(services, "_wait", lambda what, *_: press() if what.startswith(interrupted) else None)
    monkeypatch.setattr(services, "_start_what_is_missing", start)
    monkeypatch.setitem(sys.modules, "flows.local.deployments", SimpleNamespace(worker_heartbeats=set))

    with pytest.raises(Interrupted):
        services.start_services(lambda line: None)
    assert len(spawned) == (1 if interrupted == "the Prefect server" else 2)
    assert not any(process.alive() for process in spawned)
    left = Services.load()
    assert (left.server, left.worker) == (None, None)


@pytest.fixture
def ended(monkeypatch):
    """Runs that were cancelled. Following one is interrupted."""
    runs = []
    monkeypatch.setattr("flows.cli.terminal.follow", lambda *_: press())
    monkeypatch.setattr("flows.local.runs.cancel_run", lambda run: (runs.append(run), press()))
    return runs


def run_to_the_end(joined):
    demo._run_to_the_end(joined, load_recipe("mini"), "pipeline/mini", {}, Services(port=1), Console(quiet=True))


def test_a_run_that_the_command_started_is_ended_whenever_it_is_pressed(monkeypatch, ended):
    """Also while the run is being asked for, and again while it is being ended."""
    run = uuid4()

    def start(*_):
        press()
        return run

    for asking in (lambda *_: run, start):
        monkeypatch.setattr(demo, "start_run", asking)
        with pytest.raises(Interrupted, match="is cancelled and its processes have ended; the same command goes on"):
            run_to_the_end(None)
    assert ended == [run, run]


def test_a_press_that_meets_prefects_command_before_it_has_its_session_does_not_end_it(monkeypatch, tmp_path, ended):
    run = uuid4()
    prefect = tmp_path / "python"
    prefect.write_text(f"#!/bin/sh\nkill -INT $$ $PPID\necho {run}\n")
    prefect.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(prefect))
    with pytest.raises(Interrupted, match="is cancelled"):
        run_to_the_end(None)
    assert ended == [run]


def test_a_run_that_the_command_joined_goes_on(ended):
    with pytest.raises(
        Interrupted, match="the run goes on; the same command shows it again, `.venv/bin/sd3 down` ends it"
    ):
        run_to_the_end(uuid4())
    assert ended == []


@pytest.fixture
def begin(monkeypatch):
    """Opens the session of a run, as its process does first of all; nothing is started."""
    monkeypatch.setattr(runs, "_set_states", lambda *_: None)  # there is no server here
    monkeypatch.setattr(sessions, "ray_when_needed", lambda compute: nullcontext())

    def begin(run):
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", str(run))
        with sessions.session("tiny-test", None) as opened:
            return opened.recipe.run

    return begin


def test_a_process_that_comes_after_its_run_was_cancelled_does_not_begin(begin):
    """A worker that has just taken a run starts its process a second later. Retried, the run goes on."""
    run = uuid4()
    runs.cancel_run(run)
    with pytest.raises(sessions.RunCancelledError, match="before it began"):
        begin(run)
    assert begin(uuid4()) == "tiny-test"
    assert begin(run) == "tiny-test"


def test_a_run_that_was_cancelled_at_work_goes_on_when_it_is_retried(begin):
    run = uuid4()
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": str(run)}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment) as at_work:
        runs.cancel_run(run)
        assert at_work.wait(10) == -signal.SIGKILL
    assert begin(run) == "tiny-test"
