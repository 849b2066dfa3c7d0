"""Flow runs of this machine: which are at work, which are dead, which wait.

A flow run writes down its process as it starts. The record stays until the process is gone, so that a run whose process was killed,
or could not tell the server that it ended, never stays Running for ever.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed

from flows.home import ensure, home, write_whole
from flows.prefect_client import prefect_client
from flows.services import Process

RUNS_READ = 200
END_SECONDS = 10
STARTED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
UNFINISHED = [*STARTED, StateType.SCHEDULED, StateType.PAUSED]
GONE = "Its process is gone. Run the same deployment again: it goes on."


def remember_process(flow_run_id: str, process: Process) -> None:
    """Called by a flow run as it starts."""
    record = {"pid": process.pid, "born": process.born}
    write_whole(ensure(home() / "live") / f"{flow_run_id}.json", json.dumps(record))


def take_cancellation(flow_run_id: str) -> bool:
    """Asked by a flow run once it is remembered: whether it was cancelled while its process was still to come.

    Told once, so that a retry of the run, as Prefect's UI offers it, begins.
    """
    try:
        _cancelled(flow_run_id).unlink()
    except FileNotFoundError:
        return False
    return True


def _cancelled(flow_run_id: str) -> Path:
    return ensure(home() / "live") / f"{flow_run_id}.cancelled"


def fail_dead_runs(no_worker: bool = False) -> list[str]:
    """Marks runs whose process is gone as Crashed. Their names.

    `no_worker`: none lives, so that what an earlier one had taken, and what has no record of a process, is dead too.
    """
    records = {path.stem: path for path in (home() / "live").glob("*.json")}
    dead = [name for name, path in records.items() if not _alive(path)]
    runs = [run for name in dead for run in (*read_stage_runs(UUID(name)), *_read(FlowRunFilterId(any_=[UUID(name)])))]
    if no_worker:  # a stage of a pipeline has no process of its own
        runs += [run for run in _unfinished(STARTED) if run.parent_task_run_id is None and str(run.id) not in records]
    failed = []
    for run in runs:
        if run.state_type in UNFINISHED:
            _set_state(run, Crashed(message=GONE))
            failed.append(run.name)
    for name in dead:
        records[name].unlink(missing_ok=True)
    return failed


def unfinished_runs(deployment: str | None = None) -> list[FlowRun]:
    """Runs that wait or are at work, of one deployment (FLOW/NAME) or of all, without the stages of a pipeline."""
    with prefect_client() as client:
        try:
            found = client.read_deployment_by_name(deployment) if deployment else None
        except ObjectNotFound:
            return []
    runs = _unfinished(UNFINISHED, FlowRunFilterDeploymentId(any_=[found.id]) if found else None)
    return [run for run in runs if run.parent_task_run_id is None]


def described(run: FlowRun) -> str:
    return f"run {run.name}: {flow_name(run.flow_id)}, {(run.state_name or 'waiting').lower()}"


@cache
def flow_name(flow_id: UUID) -> str:
    """It never changes: the server is asked once."""
    with prefect_client() as client:
        return client.read_flow(flow_id).name


def cancel_waiting_runs() -> list[str]:
    """Runs that no worker has taken yet would begin by themselves at the next start: they are cancelled. Their names."""
    waiting = _unfinished([StateType.SCHEDULED])
    for run in waiting:
        _set_state(run, Cancelled(message="The services were stopped before it began."))
    for path in (home() / "live").glob("*.cancelled"):
        path.unlink(missing_ok=True)
    return [run.name for run in waiting]


def cancel_run(flow_run_id: UUID, reason: str = "Ctrl-C in the terminal that started it.") -> None:
    """Ends a run's processes, then the run and its stages are Cancelled. A server that is away finds out at the next start."""
    write_whole(_cancelled(str(flow_run_id)), "")  # a worker that has just taken the run may start its process after this
    with suppress(httpx.HTTPError):
        _set_states(flow_run_id, Cancelling())
    if _end_processes(flow_run_id):
        take_cancellation(str(flow_run_id))  # its process had come: the next one that comes is a retry's
    with suppress(httpx.HTTPError):
        _set_states(flow_run_id, Cancelled(message=reason))


def read_stage_runs(flow_run_id: UUID) -> list[FlowRun]:
    """The stage runs that a pipeline run started, in their order."""
    return _read(parent=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))


def _set_states(flow_run_id: UUID, state: Any) -> None:
    for run in (*_read(FlowRunFilterId(any_=[flow_run_id])), *read_stage_runs(flow_run_id)):
        if run.state_type in UNFINISHED:
            _set_state(run, state)


def _end_processes(flow_run_id: UUID) -> bool:
    """SIGKILL, as they may be killed at any moment: asked to end, Ray and the ranks take half a minute over it.

    Whether there were any.
    """
    found, deadline = False, time.monotonic() + END_SECONDS
    while (family := _processes(flow_run_id)) and time.monotonic() < deadline:
        found = True
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.2)  # what one of them was just starting shows in the next look
    return found


def _processes(flow_run_id: UUID) -> set[psutil.Process]:
    """Those that bear the run's id in their environment, and all below them (Ray's workers overwrite theirs)."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run_id):
                found |= {process, *process.children(recursive=True)}
    return {process for process in found if Process(process.pid, process.create_time()).alive()}


def _alive(record: Path) -> bool:
    try:
        return Process(**json.loads(record.read_text())).alive()
    except (OSError, ValueError, TypeError):
        return False  # not a record: no run is found by it


def _unfinished(states: list[StateType], deployment: FlowRunFilterDeploymentId | None = None) -> list[FlowRun]:
    return _read(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)), deployment=deployment)


def _read(
    ids: FlowRunFilterId | None = None,
    *,
    parent: FlowRunFilterParentFlowRunId | None = None,
    state: FlowRunFilterState | None = None,
    deployment: FlowRunFilterDeploymentId | None = None,
) -> list[FlowRun]:
    wanted = FlowRunFilter(id=ids, parent_flow_run_id=parent, state=state, deployment_id=deployment)
    with prefect_client() as client:
        return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=RUNS_READ)


def _set_state(run: FlowRun, state: Any) -> None:
    with prefect_client() as client:
        client.set_flow_run_state(run.id, state, force=True)
