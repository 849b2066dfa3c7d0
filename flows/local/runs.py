"""Flow runs of this machine: which are at work, which are dead, which wait.

The server may know runs of others: only those of this project's deployments in this home's pool, and those whose process was
written down in this home, are looked at and changed.

A flow run writes down its process as it starts. The record stays until the process is gone, so that a run whose process was killed,
or could not tell the server that it ended, never stays Running for ever.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling, Crashed

from flows.local.deployments import tagged_deployments
from flows.local.home import WORK_POOL, ensure, home, run_store, write_whole
from flows.local.prefect_client import AT_ONCE, prefect_client, read_whole
from flows.local.prefect_environment import prefect_folder
from flows.local.processes import Process
from sd3core.errors import UserError
from sd3core.files.local_paths import PROJECT
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.specs import fingerprint

END_SECONDS = 10
STARTED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
UNFINISHED_STATES = [*STARTED, StateType.SCHEDULED, StateType.PAUSED]
GONE = "Its process is gone. Run the same deployment again: it goes on."


@dataclass(frozen=True)
class Reads:
    """What a run works on and by which recipe, as it was when the run read it: its file may have been edited since."""

    recipe: str  # its fingerprint
    run: str
    store: str  # URL

    @classmethod
    def of(cls, recipe: Recipe) -> Reads:
        return cls(fingerprint(recipe.model_dump(mode="json")), recipe.run, run_store(recipe).url)


class OtherRecipe(UserError):
    """A run's process read another recipe than the command that follows it."""


def remember_process(flow_run_id: str, process: Process, reads: Reads) -> None:
    """Called by a flow run as it starts."""
    record = {**asdict(process), "reads": asdict(reads), "api": PREFECT_API_URL.value()}
    write_whole(ensure(home() / "live") / f"{flow_run_id}.json", json.dumps(record))


def what_it_reads(run: FlowRun) -> Reads | None:
    """What a run reads: as its process wrote down, else as its parameters say. None where these name no recipe."""
    if reads := what_its_process_read(run.id):
        return reads
    try:
        return Reads.of(load_recipe(run.parameters["recipe"], run.parameters.get("overrides")))
    except (KeyError, UserError):
        return None  # it will fail of that itself


def what_its_process_read(flow_run_id: UUID) -> Reads | None:
    """None before it has begun, and once it is gone."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Reads(**json.loads((home() / "live" / f"{flow_run_id}.json").read_text())["reads"])
    return None


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
    records = _records()
    dead = [flow_run for flow_run, path in records.items() if not _alive(flow_run, path)]
    runs = [run for flow_run in dead for run in (*read_stage_runs(flow_run), *_read(FlowRunFilterId(any_=[flow_run])))]
    if no_worker:  # a stage of a pipeline has no process of its own
        runs += [run for run in _own_unfinished(STARTED) if run.id not in records]
    failed = []
    for run in runs:
        if run.state_type in UNFINISHED_STATES:
            _set_state(run, Crashed(message=GONE))
            failed.append(run.name)
    for flow_run in dead:
        records[flow_run].unlink(missing_ok=True)
    return failed


def _records() -> dict[UUID, Path]:
    """Records of the runs of the server that is asked: a run of another one can only be found there."""
    found = {}
    for path in (home() / "live").glob("*.json"):
        with suppress(ValueError):  # another name is no run's
            if _json(path).get("api", PREFECT_API_URL.value()) == PREFECT_API_URL.value():
                found[UUID(path.stem)] = path
    return found


def _json(path: Path) -> dict[str, Any]:
    """Nothing of a file that is gone or damaged."""
    try:
        record = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def unfinished_runs() -> list[FlowRun]:
    """Runs that wait or are at work, without the stages of a pipeline."""
    return _own_unfinished(UNFINISHED_STATES)


def described(run: FlowRun) -> str:
    return f"run {run.name}: {flow_name(run.flow_id)}, {(run.state_name or 'waiting').lower()}"


@cache
def flow_name(flow_id: UUID) -> str:
    """It never changes: the server is asked once."""
    with prefect_client() as client:
        return client.read_flow(flow_id).name


def cancel_waiting_runs() -> list[str]:
    """Runs that no worker has taken yet would begin by themselves at the next start: they are cancelled. Their names."""
    waiting = _own_unfinished([StateType.SCHEDULED])
    for run in waiting:
        _set_state(run, Cancelled(message="The services were stopped before it began."))
    for path in (home() / "live").glob("*.cancelled"):
        path.unlink(missing_ok=True)
    return [run.name for run in waiting]


def cancel_run(flow_run_id: UUID, reason: str = "Ctrl-C in the terminal that started it.") -> None:
    """Ends a run's processes, then the run and its stages are Cancelled. A server that is away finds out at the next start."""
    # a worker that has just taken the run may start its process after this
    write_whole(_cancelled(str(flow_run_id)), "")
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
        if run.state_type in UNFINISHED_STATES:
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
    """Processes that bear the run's id in their environment, and all below them (Ray's workers overwrite theirs)."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run_id):
                found |= {process, *process.children(recursive=True)}
    return {process for process in found if _lives(process)}


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return Process.of(process.pid).alive()
    return False


def _alive(flow_run_id: UUID, record: Path) -> bool:
    """A record that is damaged names no process: those of the run bear its id."""
    try:
        return Process.from_record(_json(record)).alive()
    except ValueError:
        return bool(_processes(flow_run_id))


def _own_unfinished(states: list[StateType]) -> list[FlowRun]:
    """Unfinished runs of this project's deployments, and those that began without one in this home, as after `sd3 env`."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=states))
    deployments, recorded = _own_deployments(), list(_records())
    runs = _read(state=state, deployment=FlowRunFilterDeploymentId(any_=deployments)) if deployments else []
    runs += _read(FlowRunFilterId(any_=recorded), state=state) if recorded else []
    return [run for run in {run.id: run for run in runs}.values() if run.parent_task_run_id is None]


def _own_deployments() -> list[UUID]:
    """Deployments that this project made for this home's worker. Others may have the same names and tags."""
    made_here = (str(prefect_folder()), str(PROJECT))  # the latter by versions before
    return [each.id for each in tagged_deployments() if each.path in made_here and each.work_pool_name == WORK_POOL]


def _read(
    ids: FlowRunFilterId | None = None,
    *,
    parent: FlowRunFilterParentFlowRunId | None = None,
    state: FlowRunFilterState | None = None,
    deployment: FlowRunFilterDeploymentId | None = None,
) -> list[FlowRun]:
    wanted = FlowRunFilter(id=ids, parent_flow_run_id=parent, state=state, deployment_id=deployment)
    order = FlowRunSort.EXPECTED_START_TIME_ASC
    with prefect_client() as client:
        return read_whole(
            lambda offset: client.read_flow_runs(flow_run_filter=wanted, sort=order, limit=AT_ONCE, offset=offset)
        )


def _set_state(run: FlowRun, state: Any) -> None:
    with prefect_client() as client:
        client.set_flow_run_state(run.id, state, force=True)
