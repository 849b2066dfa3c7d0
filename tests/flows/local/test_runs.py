"""Which runs are taken for dead: those whose process is gone, and without a worker all that one had taken. Only this project's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.local import deployments, prefect_client, runs
from flows.local.home import WORK_POOL
from flows.local.processes import Process
from flows.local.runs import Reads
from sd3core.recipe_file import load_recipe

READS = Reads("abc", "mini", "file:///store")
GONE = Process(os.getpid(), 1, "")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Runs of a server, by name; `failed` are those that were marked. It hands out two of anything at once."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    for module in (runs, deployments, prefect_client):
        monkeypatch.setattr(module, "AT_ONCE", 2)
    own = SimpleNamespace(id=uuid4(), path=str(tmp_path / "prefect"), work_pool_name=WORK_POOL)
    others = [
        SimpleNamespace(id=uuid4(), path="/another/checkout", work_pool_name=WORK_POOL),
        SimpleNamespace(id=uuid4(), path=str(tmp_path / "prefect"), work_pool_name="another pool"),
        SimpleNamespace(id=uuid4(), path=None, work_pool_name=WORK_POOL),
    ]
    known, failed = {}, []

    def add(name, state, parent=None, process=None, deployment=own):
        parameters = {"recipe": "mini", "overrides": []}
        deployment_id = deployment and deployment.id
        run = SimpleNamespace(
            id=uuid4(),
            name=name,
            state_type=state,
            parent_task_run_id=parent,
            deployment_id=deployment_id,
            parameters=parameters,
        )
        known[name] = run
        if process is not None:
            runs.remember_process(str(run.id), process, READS)
        return run

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read_deployments(self, deployment_filter, limit, offset):
            assert deployment_filter.tags.all_ == ["sd3"]
            return [*others, own][offset : offset + limit]

        def read_flow_runs(self, flow_run_filter, sort, limit, offset):
            wanted = flow_run_filter
            found = [
                run
                for run in known.values()
                if (wanted.id is None or run.id in wanted.id.any_)
                and (wanted.state is None or run.state_type in wanted.state.type.any_)
                and (wanted.deployment_id is None or run.deployment_id in wanted.deployment_id.any_)
                and wanted.parent_flow_run_id is None
            ]
            return found[offset : offset + limit]

    monkeypatch.setattr(runs, "prefect_client", Client)
    monkeypatch.setattr(deployments, "prefect_client", Client)
    monkeypatch.setattr(runs, "_set_state", lambda run, state: failed.append((run.name, state.type)))
    return SimpleNamespace(add=add, failed=failed, others=others)


def test_a_run_whose_process_is_gone_is_crashed_and_one_that_was_just_taken_is_not(server):
    server.add("lives", StateType.RUNNING, process=Process.of(os.getpid()))
    server.add("gone", StateType.RUNNING, process=GONE)
    server.add("ended", StateType.COMPLETED, process=GONE)
    server.add("taken", StateType.PENDING)  # its process is coming up
    assert runs.fail_dead_runs() == ["gone"]
    assert server.failed == [("gone", StateType.CRASHED)]


def test_without_a_worker_what_one_had_taken_is_dead_and_what_none_had_waits(server):
    server.add("lives", StateType.RUNNING, process=Process.of(os.getpid()))
    server.add("taken", StateType.PENDING)
    server.add("stage", StateType.RUNNING, parent=uuid4())  # of a pipeline's run, in its process
    server.add("waits", StateType.SCHEDULED)
    assert runs.fail_dead_runs(no_worker=True) == ["taken"]


def test_runs_of_others_are_neither_seen_nor_changed(server):
    for state in (StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED):
        for number, deployment in enumerate((*server.others, None)):
            server.add(f"{state.value} {number}", state, deployment=deployment)
    assert runs.unfinished_runs() == runs.cancel_waiting_runs() == runs.fail_dead_runs(no_worker=True) == []
    assert server.failed == []
    own = [server.add(f"own {number}", StateType.SCHEDULED) for number in range(5)]  # more than one answer holds
    started_by_hand = server.add("by hand", StateType.RUNNING, process=Process.of(os.getpid()), deployment=None)
    assert runs.unfinished_runs() == [*own, started_by_hand]
    assert runs.cancel_waiting_runs() == [run.name for run in own]


def test_a_record_of_another_servers_run_stays(server, tmp_path):
    with temporary_settings({PREFECT_API_URL: "http://another/api"}):
        server.add("there", StateType.RUNNING, process=GONE)
    assert runs.fail_dead_runs() == [] and list((tmp_path / "live").glob("*.json"))
    with temporary_settings({PREFECT_API_URL: "http://another/api"}):
        assert runs.fail_dead_runs() == ["there"]
    assert not list((tmp_path / "live").glob("*.json"))


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_damaged_record_makes_no_living_run_dead(server, tmp_path, damage):
    """Its processes bear the run's id; a file of another name is no record."""
    lives, gone = (server.add(name, StateType.RUNNING, process=GONE) for name in ("lives", "gone"))
    for name in (lives.id, gone.id, "notes"):
        (tmp_path / "live" / f"{name}.json").write_text(damage)
    script = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    environment = dict(os.environ, PREFECT__FLOW_RUN_ID=str(lives.id))
    with subprocess.Popen(script, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()  # until then it may show the environment of before
            assert runs.fail_dead_runs() == ["gone"]
        finally:
            process.kill()


def test_records_of_a_version_before_are_read(server, tmp_path):
    for name in ("a", "b"):
        run = server.add(name, StateType.RUNNING, process=GONE)
        (tmp_path / "live" / f"{run.id}.json").write_text(json.dumps({"pid": os.getpid(), "born": 1.0}))
    assert sorted(runs.fail_dead_runs()) == ["a", "b"]


def test_what_a_run_reads_is_what_it_read_as_it_began(server, tmp_path):
    mini = Reads.of(load_recipe("mini"))
    assert runs.what_it_reads(server.add("waits", StateType.SCHEDULED)) == mini
    assert runs.what_it_reads(server.add("began", StateType.RUNNING, process=GONE)) == READS
    nothing = server.add("nothing", StateType.SCHEDULED)
    nothing.parameters["recipe"] = "/gone/recipe.yaml"
    assert runs.what_it_reads(nothing) is None
