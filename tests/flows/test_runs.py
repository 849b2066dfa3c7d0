"""Which runs are taken for dead: those whose process is gone, and without a worker all that one had taken."""

from __future__ import annotations

import os
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import StateType

from flows import runs
from flows.services import Process


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Runs of a server, by name; `failed` are those that were marked."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    known, failed = {}, []

    def add(name, state, parent=None, process=None):
        run = SimpleNamespace(id=uuid4(), name=name, state_type=state, parent_task_run_id=parent)
        known[name] = run
        if process is not None:
            runs.remember_process(str(run.id), process)

    def read(ids=None, *, parent=None, state=None, deployment=None):
        if ids is not None:
            return [run for run in known.values() if run.id in ids.any_]
        return [run for run in known.values() if state is not None and run.state_type in state.type.any_]

    monkeypatch.setattr(runs, "_read", read)
    monkeypatch.setattr(runs, "_set_state", lambda run, state: failed.append((run.name, state.type)))
    return SimpleNamespace(add=add, failed=failed)


def test_a_run_whose_process_is_gone_is_crashed_and_one_that_was_just_taken_is_not(server):
    server.add("lives", StateType.RUNNING, process=Process.of(os.getpid()))
    server.add("gone", StateType.RUNNING, process=Process(os.getpid(), 1.0))
    server.add("ended", StateType.COMPLETED, process=Process(os.getpid(), 1.0))
    server.add("taken", StateType.PENDING)  # its process is coming up
    assert runs.fail_dead_runs() == ["gone"]
    assert server.failed == [("gone", StateType.CRASHED)]


def test_without_a_worker_what_one_had_taken_is_dead_and_what_none_had_waits(server):
    server.add("lives", StateType.RUNNING, process=Process.of(os.getpid()))
    server.add("taken", StateType.PENDING)
    server.add("stage", StateType.RUNNING, parent=uuid4())  # of a pipeline's run, in its process
    server.add("waits", StateType.SCHEDULED)
    assert runs.fail_dead_runs(no_worker=True) == ["taken"]
