"""One training phase over Ray Train: starts the ranks, restarts them, watches them. The only file with ray.train."""

from __future__ import annotations

import itertools
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from sd3core import allocator
from sd3core.checkpoint import METRICS_FILE, list_checkpoints
from sd3core.data.store import may_pass, open_store
from sd3core.errors import UserError
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.recipe import Compute
from workers.ray_room import ranks_problem
from workers.ray_session import (
    RayLost,
    check_ray,
    drivers_mark,
    elsewhere,
    living_nodes,
    loss_of_ray,
    on_this_node,
    restart_ray,
    start_ray,
)
from workers.trainer.checkpointing import last_whole_checkpoint, newest_attempt, read_metrics
from workers.trainer.job import TrainingFailed, TrainingJob, TrainingResult, TrainingSuperseded
from workers.trainer.news import LossPoints, NewsCallback, TrainingNews, ignore_news, last_word

POLL_S = 1.0  # news is shown every two seconds; the end is noticed at once
ABORT_S = 5.0
AWAY_S = 30.0  # how long a rank waits whose store is away
HELD_S = 20.0  # how long a rank that no restart would mend waits to be ended
READ_S = 10.0  # the desk's answer is waited for; then Ray itself is looked at
TELL_S = 0.25  # a rank tells its progress at most so often

# Ray Train's controller: notice a dead rank soon, write nothing, and leave the ranks in the caller's folder.
CONTROLLER_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def train(
    job: TrainingJob,
    compute: Compute,
    report: ProgressCallback = ignore_progress,
    open_loader: Any = None,
    tell: NewsCallback = ignore_news,
) -> TrainingResult:
    """Trains a phase to its end, from its last finished checkpoint; a finished phase returns at once.

    Uses this process's Ray, else starts one. `open_loader(job, store, place, warn)` replaces the loader of shards.
    `tell` hears of losses, warnings and pictures as they come.
    Raises TrainingFailed: one line that says why it stopped. The same call goes on afterwards.
    """
    accumulation = job.training.micro_batch * compute.train_ranks
    if job.training.global_batch % accumulation:
        raise TrainingFailed(
            f"{job.phase}.global_batch {job.training.global_batch} is not a multiple of {job.phase}.micro_batch"
            f" {job.training.micro_batch} x compute.train_ranks {compute.train_ranks}"
        )
    log_dir = str(Path(job.log_dir).absolute()) if job.log_dir else None  # ranks have another working directory
    job = job.model_copy(update={"store": open_store(job.store).url, "log_dir": log_dir})
    stands = _samples_that_stand(job)
    warnings: list[str] = []
    if stands < job.last_samples:
        with start_ray(compute):
            if problem := ranks_problem(compute, living_nodes()):
                raise TrainingFailed(problem)
            warnings = _supervise(job, compute, report, tell, stands, open_loader)
        if _samples_that_stand(job) < job.last_samples:
            raise TrainingFailed(f"{job.phase}: the ranks ended before the last checkpoint was written")
    store = open_store(job.store)
    folders = [ref.folder for ref in list_checkpoints(store, job.folder, job.last_samples)]
    rows = read_metrics(store, job.folder, job.last_samples, lambda message: warnings.append(f"{job.phase}: {message}"))
    stored = [f"{job.phase}: {row['warning']}" for row in rows if "warning" in row]
    return TrainingResult(
        checkpoints=folders,
        samples=_samples_that_stand(job),
        resumed_from=stands or None,
        attempts=newest_attempt(store, job.folder),
        warnings=list(dict.fromkeys(stored + warnings)),
        metrics=[f"{folder}/{METRICS_FILE}" for folder in folders],
    )


def _supervise(
    job: TrainingJob, compute: Compute, report: ProgressCallback, tell: NewsCallback, stands: int, open_loader: Any
) -> list[str]:
    """Ray Train counts the ranks' failures from the phase's beginning. Here those since the last checkpoint count: a phase of weeks
    loses more ranks than a bad start may. The same bound holds for what Ray Train cannot restart: its own processes, and Ray.
    """
    lost, told = 0, _Told(tell)
    while True:
        try:
            _Supervisor(job, compute, report, told, stands).run(open_loader)
            return list(told.all.warnings)
        except (RanksFailed, ControllerLost, RayLost) as error:
            before, stands = stands, _samples_that_stand(job)
            lost = lost + 1 if stands <= before else 1
            if isinstance(error, RanksFailed):  # Ray Train has tried again already
                if stands <= before:
                    raise
                told.go_back(stands)
                continue
            if lost > compute.max_restarts:
                raise TrainingFailed(
                    f"{job.phase}: {error}, {lost} times without a checkpoint between them (compute.max_restarts {compute.max_restarts})"
                ) from None
            told.go_back(stands, f"{job.phase}: {error}; went on from {stands:,} samples")
            if cause := loss_of_ray(patient=True):
                restart_ray(RayLost(cause))


class _Told:
    """What is told of a phase in this call: of one supervisor after the other as of one."""

    def __init__(self, tell: NewsCallback):
        self.tell, self.before, self.all = tell, TrainingNews(), TrainingNews()

    def __call__(self, news: TrainingNews) -> None:
        before = self.before
        self.all = TrainingNews(
            before.losses + news.losses, before.warnings + news.warnings, before.previews + news.previews
        )
        self.tell(self.all)

    def go_back(self, samples: int, *warnings: str) -> None:
        """The next supervisor goes on from a checkpoint: what came after it did not stand."""
        losses = tuple(point for point in self.all.losses if point[0] <= samples)
        self.before = TrainingNews(losses, self.all.warnings + warnings, self.all.previews)
        self(TrainingNews())


def _samples_that_stand(job: TrainingJob) -> int:
    last = last_whole_checkpoint(open_store(job.store), job.folder, last_samples=job.last_samples)
    return last.samples if last else 0


@dataclass(frozen=True)
class _News:
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
class _Desk:
    """A Ray actor that runs Ray Train's `fit` in one thread and takes the ranks' messages in others."""

    news: _News = field(default_factory=_News)
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

    def read(self) -> _News:
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
        from ray.train.v2._internal.execution.callback import ControllerCallback
        from ray.train.v2._internal.execution.worker_group import worker_group

        gpu = compute.gpus_per_rank > 0
        resources = {"CPU": compute.cpus_per_rank} | ({"GPU": compute.gpus_per_rank} if gpu else {})
        threads = _threads(compute)
        desk = ray.get_runtime_context().current_actor

        def rank() -> None:
            _run_rank(job, compute, desk, open_loader)

        class Introduce(ControllerCallback):
            def after_controller_start(self, train_run_context: Any) -> None:
                desk.know.remote(ray.get_runtime_context().current_actor)
                make, number = worker_group.placement_group, itertools.count()
                worker_group.placement_group = lambda *a, **k: make(*a, **k, name=f"{label}-{next(number)}")

        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment |= drivers_mark()  # the desk is on the driver's node
        if not gpu:
            environment |= {"DS_ACCELERATOR": "cpu"} | allocator.ENVIRONMENT
        with tempfile.TemporaryDirectory(prefix="sd3-train-") as ray_only:
            trainer = TorchTrainer(
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


def _run_rank(job: TrainingJob, compute: Compute, desk: Any, open_loader: Any) -> None:
    """Runs in each rank's process."""
    import ray.train.torch

    from workers.trainer.loop import Place, train_rank

    if open_loader is None:
        from workers.trainer.shards import open_shards as open_loader
    context = ray.train.get_context()
    device = torch.device("cpu")  # whatever the machine has: Ray hides no GPU from a rank that asked for none
    if compute.gpus_per_rank > 0:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    threads = _threads(compute)
    place = Place(context.get_world_rank(), context.get_world_size(), device, threads, compute.cache_gb * 1e9, compute.decoded_gb * 1e9)
    try:
        train_rank(job, place, _DeskWatcher(desk), open_loader)
    except UserError as error:
        if may_pass(error):  # restarts at once would all be used up before the store is back
            desk.warn.remote(f"{job.phase}: {error}{elsewhere()}; the ranks start again in {AWAY_S:g} s")
            time.sleep(AWAY_S)
        else:  # the desk is told before Ray Train hears of it
            ray.get(desk.fail.remote(isinstance(error, TrainingSuperseded), f"{error}{elsewhere()}"))
            time.sleep(HELD_S)  # the driver ends this rank meanwhile; failing at once, Ray Train would try again first
        raise


class _DeskWatcher:
    """Hands a rank's news to the desk without waiting for it."""

    def __init__(self, desk: Any):
        self._desk, self._told_at = desk, 0.0
        self._losses: list[tuple[int, float]] = []  # since then

    def began(self, attempt: int, samples: int) -> None:
        self._losses = []
        self._desk.began.remote(attempt, samples)

    def progress(self, samples: int, note: str, loss: float | None) -> None:
        if loss is not None:
            self._losses.append((samples, loss))
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            self._desk.progress.remote(samples, note, self._losses)
            self._losses = []

    def preview(self, path: str) -> None:
        ray.get(self._desk.preview.remote(path))  # the rank may end right after it

    def warn(self, message: str) -> None:
        self._desk.warn.remote(message)


class RanksFailed(TrainingFailed):
    """Ray Train gave up after compute.max_restarts."""


class ControllerLost(TrainingFailed):
    """A process of Ray Train's own has died, with which it loses its ranks: a new one takes their place."""


class _Supervisor:
    """The driver's side: shows what the desk hears, and ends everything on a fatal word, a stall or an interrupt."""

    def __init__(self, job: TrainingJob, compute: Compute, report: ProgressCallback, tell: NewsCallback, stands: int):
        self.job, self.compute, self.tell = job, compute, tell
        self.meter = ProgressMeter(job.last_samples, "samples", report, already_done=stands)

    def run(self, open_loader: Any) -> None:
        actor = ray.remote(
            num_cpus=0,
            scheduling_strategy=on_this_node(),  # Ray Train puts its own such actors beside it
            concurrency_groups={"fit": 1, "abort": 1},  # all else takes turns in one thread, in the order it was sent
            runtime_env={"env_vars": CONTROLLER_ENV},
        )(_Desk)
        desk = actor.remote()
        label = f"sd3-train-{uuid.uuid4().hex}"
        finished = desk.fit.options(concurrency_group="fit").remote(self.job, self.compute, label, open_loader)
        try:
            news = self._watch(desk, finished)
            reason = ray.get(finished)
            if reason is not None:
                raise RanksFailed(
                    f"{self.job.phase}: the ranks failed {self.compute.max_restarts + 1} times"
                    f" (compute.max_restarts {self.compute.max_restarts}); last: {reason}"
                )
            self.meter.update(self.meter.total, news.note)
        except RayActorError:
            check_ray()
            raise ControllerLost("Ray Train's own process died") from None
        except RayTaskError as error:  # of the process that Ray Train runs in, as a disk without room for its own files
            raise TrainingFailed(f"{self.job.phase}: {str(error).strip().splitlines()[-1]}") from None
        finally:
            if loss_of_ray() is None:
                _end(desk, finished, label)

    def _watch(self, desk: Any, finished: Any) -> _News:
        news, heard_at = _News(), time.monotonic()
        while True:
            ended, _ = ray.wait([finished], timeout=POLL_S)
            check_ray()
            answer = _read(desk)
            latest = answer or news
            if latest.version > news.version:
                heard_at = time.monotonic()
                self.tell(TrainingNews(latest.losses, tuple(self._warnings(latest)), latest.previews))
            elif time.monotonic() - heard_at > self.compute.stall_timeout_s:
                raise TrainingFailed(
                    f"{self.job.phase}: no progress for {self.compute.stall_timeout_s:g} s (compute.stall_timeout_s)"
                    f" after {news.samples} samples; last word: {news.note or 'none'}"
                )
            news = latest
            if news.fatal is not None:
                superseded, message = news.fatal
                raise (TrainingSuperseded if superseded else TrainingFailed)(message)
            silent_s = time.monotonic() - heard_at
            self.meter.update(news.samples or self.meter.done, last_word(news.note, silent_s, self.compute.stall_timeout_s))
            if ended and answer:
                return news

    def _warnings(self, news: _News) -> list[str]:
        restarts = [
            f"{self.job.phase}: a rank was lost; went on from {samples:,} samples" for _, samples in news.began[1:]
        ]
        return [*news.warnings, *restarts]


def _read(desk: Any) -> _News | None:
    """What the desk knows; None where it is too busy to say."""
    try:
        return ray.get(desk.read.remote(), timeout=READ_S)
    except GetTimeoutError:
        return None


def _end(desk: Any, finished: Any, label: str) -> None:
    """Ends whatever of this training still runs, and gives its resources back.

    Ray Train's own cleaner of placement groups needs the dashboard; without it a killed controller's groups would stay.
    """
    with suppress(RayError):
        if not ray.wait([finished], timeout=0)[0]:
            ray.get(desk.abort.options(concurrency_group="abort").remote(), timeout=ABORT_S)
    ray.kill(desk)
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(label) and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


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
