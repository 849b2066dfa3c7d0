"""Prefect's side of the local services: deployments `STAGE/RECIPE`, the work pool, live and dead runs.

A deployment's name is the recipe's; its parameters are the recipe and an empty list of overrides, so
`prefect deployment run 'pretrain/mini' --param 'overrides=["pretrain.samples=9600"]'` changes one run only.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Crashed

from flows.home import PROJECT, ensure, home
from flows.services import WORK_POOL, Process
from sd3core.recipe import shipped_recipes
from sd3core.specs import fingerprint

STAGES = ("ingest", "towers", "caption", "encode", "pretrain", "finetune", "evaluate", "export")
FLOWS = (*STAGES, "pipeline")
RUNS_READ = 200
UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]


def recipes_to_deploy() -> dict[str, str]:
    """Deployment name -> what the flow loads: the shipped recipes, and the files added with `sd3 deploy`."""
    added = home() / "recipes.json"
    return {**{name: name for name in shipped_recipes()}, **(json.loads(added.read_text()) if added.is_file() else {})}


def add_recipe(name: str, path: Path) -> None:
    added = ensure(home()) / "recipes.json"
    known = json.loads(added.read_text()) if added.is_file() else {}
    added.write_text(json.dumps({**known, name: str(path.resolve())}, indent=1))


def deployments_fingerprint() -> str:
    return fingerprint({"project": str(PROJECT), "flows": FLOWS, "recipes": recipes_to_deploy()})


def apply_deployments() -> None:
    """Creates the work pool and every deployment; those that stand are updated in place."""
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process"))
        except ObjectAlreadyExists:
            pass
    for flow in FLOWS:
        for name, recipe in recipes_to_deploy().items():
            deployment = RunnerDeployment.from_entrypoint(
                f"flows/{flow}.py:{flow}",
                name=name,
                parameters={"recipe": recipe, "overrides": []},
                work_pool_name=WORK_POOL,
                job_variables={"working_dir": str(PROJECT)},
                tags=["sd3"],
            )
            deployment._path = str(PROJECT)
            deployment.apply()


def worker_is_online(since: float) -> bool:
    """Has the worker polled the pool after `since` (Unix seconds)?"""
    with get_client(sync_client=True) as client:
        try:
            workers = client.request(
                "POST", "/work_pools/{name}/workers/filter", path_params={"name": WORK_POOL}, json={}
            ).json()
        except ObjectNotFound:
            return False
    return any(
        datetime.fromisoformat(w["last_heartbeat_time"]).timestamp() > since
        for w in workers
        if w["last_heartbeat_time"]
    )


def remember_process(flow_run_id: str, process: Process) -> None:
    """Called by a flow run as it starts: whose life tells whether the run is alive."""
    (ensure(home() / "live") / f"{flow_run_id}.json").write_text(json.dumps({"pid": process.pid, "born": process.born}))


def forget_process(flow_run_id: str) -> None:
    (home() / "live" / f"{flow_run_id}.json").unlink(missing_ok=True)


def fail_dead_runs() -> list[str]:
    """Runs of this machine whose process is gone: marked Crashed, so that none stays Running for ever. Their names."""
    failed = []
    for record in sorted((home() / "live").glob("*.json")):
        process = Process(**json.loads(record.read_text()))
        if process.alive():
            continue
        for run in _family(UUID(record.stem)):
            if run.state_type in UNFINISHED:
                with get_client(sync_client=True) as client:
                    client.set_flow_run_state(
                        run.id,
                        Crashed(message="Its process is gone. Run the same deployment again: it goes on."),
                        force=True,
                    )
                failed.append(run.name)
        record.unlink(missing_ok=True)
    return failed


def read_runs_of(flow_run_id: UUID) -> list[FlowRun]:
    """The stage runs that a run started, in their order."""
    with get_client(sync_client=True) as client:
        return _read_runs(client, FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id])))


def live_run(deployment: str) -> FlowRun | None:
    """The unfinished run of a deployment whose process lives, if there is one."""
    with get_client(sync_client=True) as client:
        for record in sorted((home() / "live").glob("*.json")):
            if not Process(**json.loads(record.read_text())).alive():
                continue
            runs = _read_runs(client, FlowRunFilter(id=FlowRunFilterId(any_=[UUID(record.stem)])))
            for run in runs:
                if run.deployment_id and run.state_type in UNFINISHED:
                    found = client.read_deployment(run.deployment_id)
                    flow = client.read_flow(run.flow_id)
                    if f"{flow.name}/{found.name}" == deployment:
                        return run
    return None


def _read_runs(client: Any, wanted: FlowRunFilter) -> list[FlowRun]:
    return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=RUNS_READ)


def unfinished_runs() -> list[str]:
    """A line for every flow run that has not ended."""
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)))
    with get_client(sync_client=True) as client:
        runs = _read_runs(client, wanted)
        return [
            f"run {run.name}: {client.read_flow(run.flow_id).name}, {(run.state_name or 'waiting').lower()}"
            for run in runs
        ]


def _family(flow_run_id: UUID) -> list[FlowRun]:
    """A run and the stage runs it started."""
    with get_client(sync_client=True) as client:
        own = _read_runs(client, FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return [*read_runs_of(flow_run_id), *own]
