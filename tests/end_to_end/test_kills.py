"""Kill -9 of the flow's process, of a Ray worker or training rank, of the Prefect server, of every process of Ray's own and of Ray
Train's, in every stage with work in it.

The same command goes on, the pipeline completes, and what was finished at the kill is as it was. Where the flow's process lives on,
its run completes by itself. The store is made complete once; a
case removes one stage's results, so only that stage, and what its new bytes change, has to be made again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress

import psutil
import pytest
from conftest import OVERRIDES as TRAINING
from conftest import RANK, SLOW_STEPS, described, ended
from installation import PROJECT, Installation, demo_command, finished_files

pytestmark = [pytest.mark.kills, pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = "kills"
STEPS = {"pretrain": 200, "finetune.0": 160}
OVERRIDES = (
    f"run={RUN}",
    "data.name=kills",
    "data.images=384",
    "towers.name=kills",
    *TRAINING,
    SLOW_STEPS,
    "finetune.0.samples=640",
    "finetune.0.checkpoint_every_samples=160",
    "finetune.0.micro_batch=1",
    "evaluate.checkpoints=last",
)
RESULTS = {
    "ingest": ["datasets/kills/raw"],
    "towers": ["towers/kills"],
    "caption": ["datasets/kills/captions"],
    "encode": ["datasets/kills/text", "datasets/kills/latents"],
    "pretrain": [f"runs/{RUN}/checkpoints/pretrain"],
    "finetune": [f"runs/{RUN}/checkpoints/finetune.0"],
    "evaluate": [f"runs/{RUN}/evaluations"],
}
KEPT = ("datasets/", "towers/", f"runs/{RUN}/checkpoints/")
AT_WORK = "ray::_ActorHost.call"  # Ray names a process by what it executes
VICTIMS = ("flow", "ray worker", "server")
RAYS_OWN = (
    "raylet/raylet",
    "gcs_server",
    "ray::RuntimeEnvAgent",
    "ray::DashboardAgent",
    "log_monitor.py",
    "dashboard/dashboard.py",
)
RAY_TRAINS_OWN = ("ray::TrainingActor", "ray::TrainController")
TRAINING_STAGES = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def complete(installation: Installation) -> Installation:
    installation.demo(OVERRIDES)
    return installation


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", RESULTS)
def test_the_same_command_goes_on_after_a_kill(complete: Installation, stage: str, victim: str):
    installation = complete
    _, worker = at_work(installation, stage)
    victims = {"flow": installation.flow_process, "ray worker": lambda: worker, "server": installation.server_process}
    victims[victim]().kill()
    finished = finished_files(installation.store, *KEPT)

    installation.demo(OVERRIDES)

    assert_whole(installation, stage, finished)


@pytest.mark.parametrize("victim", RAYS_OWN)
@pytest.mark.parametrize("stage", RESULTS)
def test_a_run_goes_on_by_itself_after_a_kill_of_rays_own_processes(complete: Installation, stage: str, victim: str):
    """Without its raylet Ray answers nothing any more, and a raylet ends itself with its agents."""
    assert_goes_on(complete, stage, victim)


@pytest.mark.parametrize("victim", RAY_TRAINS_OWN)
@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_a_run_goes_on_by_itself_after_a_kill_of_ray_trains_own_processes(
    complete: Installation, stage: str, victim: str
):
    assert_goes_on(complete, stage, victim)


def assert_goes_on(installation: Installation, stage: str, victim: str) -> None:
    flow_run_id, _ = at_work(installation, stage)
    flow = installation.flow_process()
    next(child for child in flow.children(recursive=True) if victim in described(child)).kill()
    finished = finished_files(installation.store, *KEPT)
    installation.wait("the run to end", lambda: ended(installation, flow_run_id), seconds=420)
    run = installation.api("flow_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}})[0]
    assert run["state_type"] == "COMPLETED", installation.story(f"{victim} was killed in {stage}")
    assert_whole(installation, stage, finished)


def at_work(installation: Installation, stage: str) -> tuple[str, psutil.Process]:
    """A run with nothing of this stage made, at the moment that a worker is at work on it: its id and that worker."""
    installation.wait("the run before to be over", lambda: installation.flow_process() is None, seconds=300)
    for folder in RESULTS[stage]:
        shutil.rmtree(installation.store / folder)
    flow_run_id = installation.start("pipeline/tiny-test", OVERRIDES)
    runs = lambda: installation.stages_of(flow_run_id).get(stage) == "RUNNING" or ended(installation, flow_run_id)
    installation.wait(f"{stage} to run", runs, seconds=300)
    return flow_run_id, installation.wait(
        f"a worker of {stage}", lambda: worker_of(installation, stage), seconds=300, poll=0.01
    )


def assert_whole(installation: Installation, stage: str, finished: dict) -> None:
    """The stage was done, nothing that was finished at the kill was written again, and training took every step once."""
    summary = installation.summary(RUN)
    assert [entry["state"] for entry in summary["stages"] if entry["name"] == stage] == ["done"]
    assert {name: state for name, state in installation.files("").items() if name in finished} == finished
    assert not installation.running()
    for phase, steps in STEPS.items():
        for spec in (installation.store / f"runs/{RUN}/checkpoints/{phase}").iterdir():
            rows = [
                json.loads(line)
                for path in sorted(spec.glob("*/metrics.jsonl"))
                for line in path.read_text().splitlines()
            ]
            assert [row["step"] for row in rows] == list(range(1, steps + 1))


def test_the_same_command_goes_on_after_a_kill_of_the_prefect_worker(complete: Installation):
    """It takes its runs with it, and the command that follows one says so."""
    installation = complete
    shutil.rmtree(installation.store / RESULTS["towers"][0])
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(demo_command(*OVERRIDES), env=installation.environment, cwd=PROJECT, **piped) as shown:
        installation.wait("towers to be at work", lambda: worker_of(installation, "towers"), seconds=300)
        psutil.Process(installation.services["worker"]["pid"]).kill()
        printed, _ = shown.communicate(timeout=300)
    assert shown.returncode == 1
    assert printed.splitlines()[-1] == (
        "sd3: the Prefect worker has ended, and the run with it (the same command goes on from there)"
    )
    finished = finished_files(installation.store, *KEPT)

    installation.demo(OVERRIDES)

    assert {name: state for name, state in installation.files("").items() if name in finished} == finished
    assert not installation.running()


def worker_of(installation: Installation, stage: str) -> psutil.Process | None:
    """A Ray actor that is at work on a shard, a tower or a score; a rank that has one checkpoint behind it."""
    flow = installation.flow_process()
    if flow is None:
        return None
    title = AT_WORK
    if stage in ("pretrain", "finetune"):
        title = RANK
        if not any((installation.store / RESULTS[stage][0]).glob("*/*/DONE.json")):
            return None
    with suppress(psutil.NoSuchProcess):
        return next((child for child in flow.children(recursive=True) if described(child).startswith(title)), None)
