"""The actor in which Ray Train runs a phase and to which its ranks report.

It also holds what runs in each rank's process.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from sd3core.data.store import is_transient
from sd3core.errors import UserError
from sd3core.freed_memory import ALLOCATOR_ENVIRONMENT
from sd3core.recipe import Compute
from workers.ray_session import drivers_mark, elsewhere
from workers.trainer.job import TrainingJob, TrainingSuperseded
from workers.trainer.news import LossPoints

ABORT_S = 5.0  # how long ranks are given to end themselves
AWAY_S = 30.0  # how long a rank waits whose store is away
HELD_S = 20.0  # how long a rank that no restart would mend waits to be ended
TELL_S = 0.25  # a rank tells its progress at most so often


@dataclass(frozen=True)
class RankNews:
    """What the ranks have told so far; `version` grows with every word."""

    version: int = 0
    samples: int = 0
    note: str = ""
    began: tuple[tuple[int, int], ...] = ()  # (attempt, samples it went on from)
    losses: tuple[tuple[int, float], ...] = ()  # (samples, loss), thinned
    previews: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fatal: tuple[bool, str] | None = None  # (superseded, message): no restart can mend it


@dataclass
class TrainingActor:
    """A Ray actor that runs Ray Train's `fit` in one thread and takes the ranks' messages in others."""

    news: RankNews = field(default_factory=RankNews)
    losses: LossPoints = field(default_factory=LossPoints)
    controller: Any = None

    def began(self, attempt: int, samples: int) -> None:
        self.losses.go_back(samples)
        self._tell(began=(*self.news.began, (attempt, samples)), samples=samples, note=f"attempt {attempt}")

    def progress(self, samples: int, note: str, losses: list[tuple[int, float]]) -> None:
        for point in losses:
            self.losses.add(*point)
        self._tell(samples=samples, note=note, losses=self.losses.with_last())

    def preview(self, path: str) -> None:
        self._tell(previews=(*self.news.previews, path))

    def warn(self, message: str) -> None:
        self._tell(warnings=(*self.news.warnings, message))

    def fail(self, superseded: bool, message: str) -> None:
        self._tell(fatal=(superseded, message))

    def _tell(self, **changes: Any) -> None:
        self.news = replace(self.news, version=self.news.version + 1, **changes)

    def read(self) -> RankNews:
        return self.news

    def know(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """Ends the ranks the way Ray Train does it on an interrupt; while they start it cannot."""
        if self.controller is not None:
            with suppress(RayError):
                ray.get(self.controller.abort.remote(), timeout=ABORT_S)

    def fit(self, job: TrainingJob, compute: Compute, label: str, open_loader: Any) -> str | None:
        """Runs the ranks to their end; returns the reason where Ray Train gave up. `label` names its groups."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # Private, and pinned with Ray.
        from ray.train.v2._internal.callbacks import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
        from ray.train.v2._internal.execution.callback import ControllerCallback
        from ray.train.v2._internal.execution.worker_group import worker_group

        gpu = compute.gpus_per_rank > 0
        resources = {"CPU": compute.cpus_per_rank} | ({"GPU": compute.gpus_per_rank} if gpu else {})
        threads = _threads(compute)
        actor = ray.get_runtime_context().current_actor

        def rank() -> None:
            _run_rank(job, compute, actor, open_loader)

        class Trainer(TorchTrainer):
            """Without two processes for which nothing is to do: no Ray Data is read, and the driver removes the ranks'
            placement groups, also where the cleaner cannot, which asks a dashboard. Each takes a phase's start seconds.
            """

            def _create_default_callbacks(self) -> list[Any]:
                unused = DatasetsCallback, PlacementGroupCleanerCallback
                return [
                    callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)
                ]

        class Introduce(ControllerCallback):
            def after_controller_start(self, train_run_context: Any) -> None:
                actor.know.remote(ray.get_runtime_context().current_actor)
                make, number = worker_group.placement_group, itertools.count()
                worker_group.placement_group = lambda *a, **k: make(*a, **k, name=f"{label}-{next(number)}")

        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment |= drivers_mark()  # the actor is on the driver's node
        if not gpu:
            environment |= {"DS_ACCELERATOR": "cpu"} | ALLOCATOR_ENVIRONMENT
        with tempfile.TemporaryDirectory(prefix="sd3-train-") as ray_only:
            trainer = Trainer(
                rank,
                torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=compute.train_ranks,
                    use_gpu=gpu,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=label,  # a known name would make Ray Train resume by its own state
                    storage_path=ray_only,
                    failure_config=FailureConfig(max_failures=compute.max_restarts),
                    worker_runtime_env={"env_vars": environment},
                    callbacks=[Introduce()],
                ),
            )
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                return _last_cause(error)
        return None


def _threads(compute: Compute) -> int:
    return max(1, int(compute.cpus_per_rank))


def _run_rank(job: TrainingJob, compute: Compute, actor: Any, open_loader: Any) -> None:
    """Runs in each rank's process."""
    import ray.train.torch
    import torch

    from workers.trainer.loop import RankContext, train_rank

    if open_loader is None:
        from workers.trainer.shards import open_shards as open_loader
    context = ray.train.get_context()
    device = torch.device("cpu")  # whatever the machine has: Ray hides no GPU from a rank that asked for none
    if compute.gpus_per_rank > 0:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    threads = _threads(compute)
    place = RankContext(
        context.get_world_rank(),
        context.get_world_size(),
        device,
        threads,
        compute.cache_gb * 1e9,
        compute.decoded_gb * 1e9,
        compute.decodes_beside_ranks,
    )
    try:
        train_rank(job, place, ActorWatcher(actor), open_loader)
    except UserError as error:
        if is_transient(error):  # restarts at once would all be used up before the store is back
            actor.warn.remote(f"{job.phase}: {error}{elsewhere()}; the ranks start again in {AWAY_S:g} s")
            time.sleep(AWAY_S)
        else:  # the actor is told before Ray Train hears of it
            ray.get(actor.fail.remote(isinstance(error, TrainingSuperseded), f"{error}{elsewhere()}"))
            time.sleep(HELD_S)  # the driver ends this rank meanwhile; failing at once, Ray Train would try again first
        raise


class ActorWatcher:
    """Hands a rank's news to the actor without waiting for it."""

    def __init__(self, actor: Any):
        self._actor, self._told_at = actor, 0.0
        self._losses: list[tuple[int, float]] = []  # since then

    def began(self, attempt: int, samples: int) -> None:
        self._losses = []
        self._actor.began.remote(attempt, samples)

    def progress(self, samples: int, note: str, loss: float | None) -> None:
        if loss is not None:
            self._losses.append((samples, loss))
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            self._actor.progress.remote(samples, note, self._losses)
            self._losses = []

    def preview(self, path: str) -> None:
        ray.get(self._actor.preview.remote(path))  # the rank may end right after it

    def warn(self, message: str) -> None:
        self._actor.warn.remote(message)


def _last_cause(error: BaseException) -> str:
    """The last line of what a rank raised; a UserError's own words, as the other ranks then only miss that rank."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in failures:
        raised = getattr(failure, "_base_exc", failure)  # private, and pinned with Ray
        if isinstance(raised, UserError):
            return str(raised)
    cause = failures[0] if failures else getattr(error, "controller_failure", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
