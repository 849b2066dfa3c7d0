"""A phase through Ray Train and DeepSpeed on two real ranks: a killed rank, a stall, an error."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fake_training
import psutil
import pytest
import torch
from fake_training import UNTIMED, fake_loader, make_job
from ray import cloudpickle

from sd3core.checkpoint_record import list_checkpoints
from sd3core.data.provenance import device_kind, provenance_of
from sd3core.data.store import StoreNotFound, is_transient, open_store
from sd3core.errors import DataError, StoreError
from sd3core.recipe import Compute
from sd3core.training_checkpoint import assemble_weights
from workers.ray_session import start_ray
from workers.trainer import TrainingFailed, launch, train
from workers.trainer.launch import RanksFailed
from workers.trainer.news import ignore_news
from workers.trainer.standing_checkpoints import read_metrics

for module in (fake_training, sys.modules[__name__]):  # ranks do not have the tests on their path
    cloudpickle.register_pickle_by_value(module)
COMPUTE = Compute(train_ranks=2, cpus_per_rank=1)
pytestmark = pytest.mark.slow


@pytest.fixture
def own_ray():
    """A Ray of its own for each test: one that was ended by force may keep its resources until Ray stops."""
    with start_ray(COMPUTE):
        yield


def open_fake(job, store, place, warn):
    return fake_loader(job, place.rank, place.world)


def open_fake_stuck_once(job, store, place, warn):
    """The first attempt waits after 48 of 96 samples, past the checkpoint at 32, until it is killed."""
    first = len(store.list(f"{job.folder}/attempts/")) == 1
    return fake_loader(job, place.rank, place.world, stuck_at=6 if first else None)


def rows_of(job):
    rows = read_metrics(open_store(job.store), job.folder)
    return [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows]


def kill_a_rank_after_a_checkpoint(job):
    """(report callback, list of killed pids): kills -9 the younger rank once a checkpoint stands."""
    store = open_store(job.store)
    killed: list[int] = []

    def report(_) -> None:
        if not killed and list_checkpoints(store, job.folder):
            ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
            victim = max(ranks, key=lambda p: p.create_time())
            killed.append(victim.pid)
            victim.kill()

    return report, killed


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """In one Ray: a whole phase, outside the main thread, as Prefect runs tasks in threads; then calls that must not start one."""

    def open_nothing(job, store, place, warn):
        raise DataError("datasets/none/latents/0: no manifest; run the encode stage")

    root = tmp_path_factory.mktemp("calm")
    jobs = {name: make_job(root / name) for name in ("whole", "mistaken", "many")}
    jobs["many-singly"] = make_job(root / "many-singly", micro_batch=1)
    eight = COMPUTE.model_copy(update={"train_ranks": 8})
    seen, failed = [], {}
    with start_ray(COMPUTE), ThreadPoolExecutor(1) as thread:
        result = thread.submit(train, jobs["whole"], COMPUTE, seen.append, open_fake).result()
        for name, compute, opens in (
            ("mistaken", COMPUTE, open_nothing),
            ("many", eight, None),
            ("many-singly", eight, None),
        ):
            with pytest.raises(TrainingFailed) as raised:
                train(jobs[name], compute, open_loader=opens)
            failed[name] = str(raised.value)
    return SimpleNamespace(jobs=jobs, result=result, seen=seen, failed=failed)


@pytest.fixture(scope="module")
def undisturbed(calm):
    return calm.jobs["whole"], calm.result, calm.seen


def test_an_undisturbed_phase(undisturbed):
    job, result, seen = undisturbed
    assert result.samples == 96 and result.attempts == 1 and result.resumed_from is None and result.warnings == []
    assert [folder[-12:] for folder in result.checkpoints] == ["000000000032", "000000000064", "000000000096"]
    assert seen[-1].done == 96 and seen[-1].total == 96 and seen[-1].note.startswith("loss ")
    assert len(rows_of(job)) == 12
    makers = provenance_of(open_store(job.store), f"{result.checkpoints[-1]}/DONE.json")
    assert [(maker.device, maker.devices) for maker in makers] == [(device_kind(), COMPUTE.train_ranks)]


def test_a_finished_phase_returns_at_once(undisturbed):
    job, before, _ = undisturbed
    started = time.monotonic()
    again = train(job, COMPUTE)
    assert time.monotonic() - started < 1
    assert again.checkpoints == before.checkpoints and again.resumed_from == 96 and again.attempts == 1


@pytest.mark.usefixtures("own_ray")
def test_a_killed_rank_changes_nothing(undisturbed, tmp_path):
    """The restart goes on from the last checkpoint; losses and weights are those of the undisturbed run, bit by bit."""
    calm_job, _, _ = undisturbed
    job = make_job(tmp_path / "store")
    report, killed = kill_a_rank_after_a_checkpoint(job)
    result = train(job, COMPUTE, report, open_fake_stuck_once)
    assert killed and result.attempts == 2
    assert result.warnings == ["pretrain: a rank was lost; went on from 32 samples"]
    assert rows_of(job) == rows_of(calm_job)
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        ours = assemble_weights(open_store(job.store), result.checkpoints[-1], kind)
        calm = assemble_weights(open_store(calm_job.store), result.checkpoints[-1], kind)
        assert all(torch.equal(ours[name], calm[name]) for name in calm)


@pytest.mark.parametrize(
    "victim, warning",
    [
        ("ray::TrainingActor", "Ray Train's own process died"),
        pytest.param("ray::TrainController", "Ray Train's own process died", marks=pytest.mark.kills),
        pytest.param("raylet/raylet", "Ray's raylet on this machine has died", marks=pytest.mark.kills),
        pytest.param("gcs_server", "Ray's GCS server on this machine has died", marks=pytest.mark.kills),
        pytest.param("ray::RuntimeEnvAgent", "Ray's raylet on this machine has died", marks=pytest.mark.kills),
        pytest.param("ray::DashboardAgent", "Ray's raylet on this machine has died", marks=pytest.mark.kills),
    ],
)
@pytest.mark.usefixtures("own_ray")
def test_a_process_of_rays_own_that_dies_costs_a_restart(undisturbed, tmp_path, victim, warning):
    """What Ray Train cannot restart: its actor and controller, and Ray below it. The same call goes on from the last checkpoint."""
    calm_job, _, _ = undisturbed
    job = make_job(tmp_path / "store")
    killed, told = [], []

    def report(_) -> None:
        if not killed and list_checkpoints(open_store(job.store), job.folder):
            process = next(
                p for p in psutil.Process().children(recursive=True) if victim in " ".join(p.cmdline())[:200]
            )
            killed.append(process.pid)
            process.kill()

    result = train(job, COMPUTE, report, open_fake_stuck_once, told.append)
    assert killed and result.attempts == 2
    said = [f"pretrain: {words}; went on from 32 samples" for words in ("Ray Train's own process died", warning)]
    assert result.warnings in (said[1:], said)  # a raylet whose agent has died ends the actors first, then itself
    assert rows_of(job) == rows_of(calm_job)
    assert list(told[-1].warnings) == result.warnings
    assert [samples for samples, _ in told[-1].losses] == sorted({samples for samples, _ in told[-1].losses})


@pytest.mark.usefixtures("own_ray")
def test_a_stall_is_an_error_that_says_so(tmp_path):
    def open_stuck(job, store, place, warn):
        return fake_loader(job, place.rank, place.world, stuck_at=0)

    started = time.monotonic()
    with pytest.raises(TrainingFailed, match="no progress for 12 s"):
        train(make_job(tmp_path / "store"), COMPUTE.model_copy(update={"stall_timeout_s": 12}), open_loader=open_stuck)
    assert time.monotonic() - started < 40


def test_an_error_of_the_user_is_not_tried_again(calm):
    assert calm.failed["mistaken"].startswith("datasets/none/latents/0: no manifest")
    job = calm.jobs["mistaken"]
    store = open_store(job.store)
    assert len(store.list(f"{job.folder}/attempts/")) == 1 and list_checkpoints(store, job.folder) == []


def test_more_ranks_than_the_machine_has(calm):
    assert "global_batch 8 is not a multiple of pretrain.micro_batch 2 x" in calm.failed["many"]
    assert "compute.train_ranks 8 x compute.cpus_per_rank 1 is more than the 2 CPUs" in calm.failed["many-singly"]


@pytest.mark.parametrize("stand", [[32, 64, 64], [0]])
def test_restarts_are_counted_from_the_last_checkpoint(monkeypatch, tmp_path, stand):
    """Ray Train's own count is of the whole phase."""
    began, standing = [], iter(stand)

    class GivesUp:
        def __init__(self, job, compute, report, tell, stands):
            began.append(stands)

        def run(self, open_loader):
            raise RanksFailed("pretrain: the ranks failed 4 times")

    monkeypatch.setattr(launch, "_Supervisor", GivesUp)
    monkeypatch.setattr(launch, "_samples_that_stand", lambda job: next(standing))
    with pytest.raises(TrainingFailed, match="^pretrain: the ranks failed 4 times$"):
        launch._supervise(None, COMPUTE, None, ignore_news, 0, None)
    assert began == [0, *stand[:-1]]


def test_which_errors_a_restart_may_mend():
    assert is_transient(StoreError("s3://b: cannot be reached"))
    for error in (StoreNotFound("s3://b/x: no such object"), DataError("x"), TrainingFailed("x")):
        assert not is_transient(error)


@pytest.mark.kills
@pytest.mark.usefixtures("own_ray")
def test_a_store_that_is_away_for_a_moment_costs_a_restart(tmp_path):
    def open_once_away(job, store, place, warn):
        if len(store.list(f"{job.folder}/attempts/")) == 1:
            raise StoreError("s3://bucket: cannot be reached")
        return fake_loader(job, place.rank, place.world)

    result = train(make_job(tmp_path / "store"), COMPUTE, open_loader=open_once_away)
    assert result.samples == 96 and result.attempts == 2
    assert [line for line in result.warnings if line.endswith("cannot be reached; the ranks start again in 30 s")]


@pytest.mark.kills
@pytest.mark.usefixtures("own_ray")
def test_a_store_that_stays_away_is_named_in_one_line(tmp_path):
    def open_away(job, store, place, warn):
        if place.rank == 1:
            raise StoreError("s3://bucket: cannot be reached")
        return fake_loader(job, place.rank, place.world)

    compute = COMPUTE.model_copy(update={"max_restarts": 1})
    with pytest.raises(TrainingFailed, match=r"failed 2 times .*; last: s3://bucket: cannot be reached$"):
        train(make_job(tmp_path / "store"), compute, open_loader=open_away)
