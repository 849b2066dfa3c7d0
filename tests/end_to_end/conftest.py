"""The tiny-test recipe on real services: a Prefect server, a worker, Ray, DeepSpeed. One chain with a kill in it serves all tests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from installation import FileState, Installation

RUN = "runs/tiny-test"
STAGES = ["ingest", "towers", "caption", "encode", "pretrain", "finetune", "evaluate", "export"]
STEPS, BATCH = 200, 8
FIRST, LAST = 800, 1600  # samples at the checkpoints
OVERRIDES = (
    f"pretrain.samples={LAST}",
    f"pretrain.checkpoint_every_samples={FIRST}",
    "compute.actors=1",  # loading models takes longer than the work that two would share; the chain on S3 has two
)
# Where something is to happen between the checkpoints: slow steps keep the last from being written before.
SLOW_STEPS = "pretrain.micro_batch=1"
# Where nobody looks at the scores but the last.
FEW_SCORES = ("evaluate.weights=ema", "evaluate.checkpoints=last")
DATA = ("datasets/", "towers/")
LEFT_SECONDS = 30
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
RANK = "ray::RayTrainWorker"


_standing: list[Installation] = []


@pytest.fixture(scope="session")
def installation() -> Iterator[Installation]:
    """Services that are up; they go down whatever happens, also when the tests are interrupted or terminated."""
    made = Installation()
    _standing.append(made)
    try:
        made.command("sd3", "up", seconds=240)
        yield made
    finally:
        made.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last chain the services go down at once: an idle Prefect server takes a sixth of a core from what follows.

    A process of xdist has all chains one after the other; where all is in one process more may come.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and nextitem is not None and nextitem.path.parent != item.path.parent:
        for made in _standing:
            made.command("sd3", "down", seconds=90)
        _standing.clear()


@dataclass(frozen=True)
class Killed:
    flow_run_id: str
    stages: dict[str, str]  # stage -> Prefect's state type, at the time of the kill
    left: list[str]  # processes of the flow that were there LEFT_SECONDS later, but for
    agents: list[psutil.Process]  # Ray's two, which look for their head for a minute before they end
    checkpoints: list[str]  # of pretraining, finished
    shown: dict[str, str]  # artifact key -> description, in the UI while pretraining worked
    data: dict[str, FileState]


@dataclass(frozen=True)
class Finished:
    printed: str
    seconds: float
    summary: dict[str, Any]
    files: dict[str, FileState]

    @property
    def states(self) -> dict[str, str]:
        return {stage["name"]: stage["state"] for stage in self.summary["stages"]}

    @property
    def reasons(self) -> dict[str, str]:
        return {stage["name"]: stage["reason"] for stage in self.summary["stages"]}


@pytest.fixture(scope="session")
def killed(installation: Installation) -> Killed:
    """A pipeline run whose process is killed between two checkpoints of pretraining.

    Ranks notice it after seconds. They are stopped meanwhile, so that the last checkpoint is not written by then.
    """
    flow_run_id = installation.start("pipeline/tiny-test", OVERRIDES)
    checkpoints = installation.store / RUN / "checkpoints" / "pretrain"
    installation.wait(
        f"the first checkpoint of run {flow_run_id}",
        lambda: list(checkpoints.glob(f"*/{FIRST:012d}/DONE.json")),
        seconds=420,
        poll=0.02,
        unless=lambda: ended(installation, flow_run_id),
    )
    victim = installation.flow_process()
    assert victim is not None, installation.story("the flow ended before it could be killed")
    family = {victim, *victim.children(recursive=True)}
    ranks = [process for process in family if described(process).startswith(RANK)]
    for rank in ranks:
        rank.suspend()

    def artifacts() -> dict[str, str]:
        return {artifact["key"]: artifact["description"] for artifact in installation.api("artifacts/filter")}

    installation.wait("the ranks' progress", lambda: "loss" in artifacts().get("pretrain-progress", ""), seconds=30)
    shown = artifacts()
    agents = [process for process in family if described(process).startswith(RAY_AGENTS)]
    victim.kill()
    psutil.wait_procs(family - {*agents, *ranks}, timeout=LEFT_SECONDS / 2)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    psutil.wait_procs(family - {*agents}, timeout=LEFT_SECONDS / 2)
    left = {process for process in family if process.is_running()} | (
        installation.processes() - installation.service_processes()
    )
    return Killed(
        flow_run_id=flow_run_id,
        stages=installation.stages_of(flow_run_id),
        left=[described(process) for process in left - {*agents}],
        agents=agents,
        shown=shown,
        checkpoints=[path.parent.name for path in checkpoints.glob("*/*/DONE.json")],
        data=installation.files(*DATA),
    )


@pytest.fixture(scope="session")
def resumed(installation: Installation, killed: Killed) -> Finished:
    """The same recipe again, after the kill."""
    return demo(installation, OVERRIDES)


def demo(installation: Installation, overrides: tuple[str, ...] = ()) -> Finished:
    started = time.monotonic()
    printed = installation.demo(overrides)
    return Finished(
        printed,
        time.monotonic() - started,
        installation.summary(),
        installation.files("datasets/", "towers/", "references/", "runs/"),
    )


def ended(installation: Installation, flow_run_id: str) -> bool:
    """Stops a wait for something that will not come."""
    run = installation.api("flow_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}})[0]
    return run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def described(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200].strip()
    except psutil.Error:
        return f"process {process.pid}, gone by now"
