from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray

from sd3core.errors import DataError, StoreError
from sd3core.recipe import Compute
from workers.pool import PoolFailed, PoolSettings, map_over_actors
from workers.ray_session import RayFailed, start_ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module
pytestmark = pytest.mark.slow
TWO = PoolSettings(actors=2, max_attempts=3, stall_timeout_s=60)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ["RAY_ADDRESS"] = "10.255.255.1:6379"  # a stale address in the environment must not matter
    try:
        with start_ray(Compute(object_store_mb=80)):
            yield
    finally:
        del os.environ["RAY_ADDRESS"]


class Worker:
    """Each task is (name, what to do); every attempt leaves a line in `log`."""

    def __init__(self, log: str, load: str = "") -> None:
        self.log = Path(log)
        self.progress = 0
        if load == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if load == "die once" and not self.log.exists():
            self.log.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if load == "user error":
            raise DataError("no such folder: towers/x")
        if load == "away once" and not self.log.exists():
            self.log.write_text("")
            raise StoreError("s3://b: cannot be reached")
        if load == "bug":
            raise ZeroDivisionError("one over nothing")

    def __call__(self, task: tuple[str, str]) -> str:
        name, action = task
        lines = self.log.read_text().split() if self.log.exists() else []
        with self.log.open("a") as log:
            log.write(f"{name}\n")
        if action == "leave":
            return tempfile.mkdtemp()
        if action == "raise":
            raise StoreError(f"shard {name} cannot be read")
        if action == "bug":
            raise KeyError("width")
        if action == "no gpu":
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered, {os.getpid()}")
        if action == "who":
            return str(os.getpid())
        if action == "meet":
            deadline = time.monotonic() + 30
            while len(set(self.log.read_text().split())) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            if name == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "die once" and name not in lines:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(60)
        if action == "slow":
            for _ in range(10):
                time.sleep(0.5)
                self.progress += 1
        return name.upper() + os.environ["OMP_NUM_THREADS"]


class ThreeAtOnce(Worker):
    tasks_at_once = 3


def run(tmp_path, tasks, settings=TWO, load="", report=None, watch=None):
    return map_over_actors(Worker, {"log": str(tmp_path / "log"), "load": load}, tasks, settings, report, watch)


def attempts(tmp_path, name):
    return (tmp_path / "log").read_text().split().count(name)


def test_outcomes_in_task_order_and_a_poison_task_is_quarantined_with_its_reason(tmp_path):
    tasks = [("a", ""), ("poison", "raise"), ("b", ""), ("bug", "bug"), ("c", "")]
    reports = []
    outcomes = run(tmp_path, tasks, report=lambda outcome, done, total: reports.append((outcome.task[0], done, total)))

    assert [o.task for o in outcomes] == tasks
    assert [o.result for o in outcomes] == ["A1", None, "B1", None, "C1"]
    assert outcomes[1].error == "shard poison cannot be read"
    assert outcomes[3].error.startswith("KeyError: 'width' (test_pool.py:")
    assert [o.attempts for o in outcomes] == [1, 3, 1, 3, 1]
    assert attempts(tmp_path, "poison") == 3
    assert sorted(name for name, _, _ in reports) == ["a", "b", "bug", "c", "poison"]
    assert [(done, total) for _, done, total in reports] == [(i, 5) for i in range(1, 6)]


def test_a_worker_killed_in_a_task_is_replaced_and_everything_is_done_once(tmp_path):
    outcomes = run(tmp_path, [("a", ""), ("victim", "die once"), ("b", ""), ("c", "")])
    assert [o.result for o in outcomes] == ["A1", "VICTIM1", "B1", "C1"]
    assert [o.attempts for o in outcomes] == [1, 2, 1, 1]
    assert [attempts(tmp_path, name) for name in ("a", "victim", "b", "c")] == [1, 2, 1, 1]


def test_a_task_that_kills_every_worker_is_quarantined(tmp_path):
    outcomes = run(tmp_path, [("deadly", "die"), ("a", "")], PoolSettings(actors=2, max_attempts=2))
    assert outcomes[0].error.startswith("the worker process died")
    assert outcomes[0].attempts == 2
    assert outcomes[1].result == "A1"


def run_three(tmp_path, tasks):
    return map_over_actors(
        ThreeAtOnce, {"log": str(tmp_path / "log")}, tasks, PoolSettings(actors=1, stall_timeout_s=60)
    )


def test_a_worker_that_takes_several_tasks_has_them_at_once(tmp_path):
    outcomes = run_three(tmp_path, [(name, "meet") for name in "abc"])
    assert [(o.result, o.attempts) for o in outcomes] == [("A1", 1), ("B1", 1), ("C1", 1)]
    total = sum(o.seconds for o in outcomes)
    assert 0.5 < total < 3 * min(o.seconds for o in outcomes) + 0.5  # shared time counts once


def test_a_task_that_kills_its_worker_takes_no_other_with_it(tmp_path):
    """Nobody knows which of three it was: each is tried again alone, and only the one to blame is given up."""
    outcomes = run_three(tmp_path, [("a", "meet"), ("poison", "meet"), ("b", "meet"), ("c", "")])
    assert [o.result for o in outcomes] == ["A1", None, "B1", "C1"]
    assert outcomes[1].error.startswith("the worker process died") and attempts(tmp_path, "poison") == 3
    assert {o.attempts for o in (outcomes[0], outcomes[2])} == {2}


def test_a_worker_killed_once_while_loading_is_replaced(tmp_path):
    assert run(tmp_path, [("a", "")], PoolSettings(actors=1), load="die once")[0].result == "A1"


@pytest.mark.parametrize(
    "load, message",
    [
        ("die", "no Worker could be started, after 2 attempts each: the worker process died"),
        ("bug", "ZeroDivisionError: one over nothing"),
    ],
)
def test_workers_that_never_load_are_one_clear_error(tmp_path, load, message):
    with pytest.raises(PoolFailed, match=message):
        run(tmp_path, [("a", ""), ("b", "")], PoolSettings(actors=2, max_attempts=2), load=load)


def test_a_user_error_while_loading_ends_at_once_with_its_message(tmp_path):
    with pytest.raises(PoolFailed, match="^no such folder: towers/x$"):
        run(tmp_path, [("a", "")], load="user error")


def test_a_store_that_is_away_while_a_worker_loads_is_asked_again(tmp_path):
    assert run(tmp_path, [("a", "")], PoolSettings(actors=1), load="away once")[0].result == "A1"


def test_a_worker_whose_gpu_is_lost_is_replaced(tmp_path):
    """It would fail at every task that it takes, faster than the others work."""
    outcomes = run(tmp_path, [("x", "no gpu"), ("y", "who")], PoolSettings(actors=1, max_attempts=1))
    assert outcomes[0].error.startswith("RuntimeError: CUDA error: an illegal memory access")
    assert outcomes[1].result not in outcomes[0].error.split()


def test_a_stalled_task_is_given_up_but_one_that_progresses_is_not(tmp_path):
    seen = []
    settings = PoolSettings(actors=2, max_attempts=1, stall_timeout_s=3)
    outcomes = run(
        tmp_path, [("stuck", "hang"), ("long", "slow")], settings, watch=lambda task, p: seen.append((task[0], p))
    )
    assert outcomes[0].error == "no progress for 3 s"
    assert outcomes[1].result == "LONG1"
    assert seen[-1][0] == "long" and seen[-1][1] >= 5


def test_what_a_killed_worker_leaves_lies_in_the_sessions_folder(tmp_path):
    left = Path(run(tmp_path, [("a", "leave")], PoolSettings(actors=1))[0].result)
    assert left.is_dir() and left.parent.name == f"scratch_{os.getpid()}"


def test_no_tasks_start_nothing(tmp_path):
    assert run(tmp_path, []) == []


def test_an_initialised_ray_is_used_and_left_running(tmp_path):
    before = ray.get_runtime_context().get_job_id()
    with start_ray(Compute()):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_a_ray_that_does_not_come_in_time_is_told_in_plain_words(monkeypatch):
    def late(**_):
        raise Exception("The current node timed out during startup. This could happen because the GCS is overloaded.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(
        RayFailed, match="^Ray did not start within its half minute, tried 3 times: other work keeps this machine busy$"
    ):
        with start_ray(Compute()):
            pass


def test_local_ray_listens_on_loopback_only():
    sockets = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # a worker of an earlier test that is just ending
            sockets += [s for s in process.net_connections(kind="inet") if s.status == psutil.CONN_LISTEN]
    assert len(sockets) > 4
    assert {s.laddr.ip.removeprefix("::ffff:") for s in sockets} == {"127.0.0.1"}


def test_actors_that_no_machine_has_room_for_are_refused_at_once(tmp_path):
    with pytest.raises(
        PoolFailed,
        match=r"^compute.cpus_per_actor 64 is more than the 2 CPUs that the largest node of Ray has \(127.0.0.1\)",
    ):
        run(tmp_path, [("a", "")], PoolSettings(actors=1, cpus_per_actor=64))


def test_actors_that_the_cluster_does_not_come_to_hold_end_in_an_error_that_says_so(tmp_path):
    """Nodes that it adds by itself are waited for."""
    settings = PoolSettings(actors=1, cpus_per_actor=64, max_attempts=1, load_timeout_s=2, autoscaling=True)
    with pytest.raises(
        PoolFailed, match="not loaded after 2 s .free in Ray: 2 CPUs, 0 GPUs; compute.actors may ask for more"
    ):
        run(tmp_path, [("a", "")], settings)


@pytest.mark.parametrize(
    "victim",
    [
        "raylet/raylet",
        *(
            pytest.param(name, marks=pytest.mark.kills)
            for name in ("gcs_server", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
        ),
    ],
)
def test_when_ray_itself_dies_it_is_started_again_and_what_was_at_work_too(tmp_path, victim):
    """Also in a process whose parent is init (a container's first process, or the one that started it has died): Ray ends such a
    one without a word when it speaks to a raylet that is dead, unless it is kept from that (workers/__init__.py).
    """
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", orphan, __file__, victim, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
    )
    said = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else done.stdout
    assert re.fullmatch(
        r"Ray's (raylet|GCS server) on this machine has died; Ray was started again, and what was at work begins anew\n"
        r"A1 B1 C1",
        said,
    ), said
    assert attempts(tmp_path, "a") == 1 and attempts(tmp_path, "b") == 2


def when_ray_itself_dies(victim: str, folder: Path) -> None:
    """Three tasks, during which `victim` is killed once: leaves what the pool told, and the results."""
    told = []

    def kill_once(task, progress):
        if not told and not (folder / "killed").exists():
            (folder / "killed").touch()
            named(victim).kill()

    tasks = [("a", ""), ("b", "slow"), ("c", "")]
    settings = PoolSettings(actors=1, stall_timeout_s=60)
    with start_ray(Compute(object_store_mb=80)):
        outcomes = map_over_actors(Worker, {"log": str(folder / "log")}, tasks, settings, None, kill_once, told.append)
    (folder / "told").write_text("\n".join([*told, " ".join(o.result for o in outcomes)]))


def named(what: str) -> psutil.Process:
    """The first of Ray's processes below this one whose command line has these words."""
    return next(p for p in psutil.Process().children(recursive=True) if what in " ".join(p.cmdline())[:200])


if __name__ == "__main__":
    when_ray_itself_dies(sys.argv[1], Path(sys.argv[2]))
