"""Runs one training phase over Ray Train: starts, watches and restarts its ranks."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from sd3core.checkpoint_record import METRICS_FILE, list_checkpoints
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.store import open_store
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.recipe import Compute
from workers.caches import checked_here
from workers.ray_room import ranks_problem
from workers.ray_session import (
    RayLost,
    check_ray,
    living_nodes,
    loss_of_ray,
    on_this_node,
    restart_ray,
    start_ray,
)
from workers.trainer.actor import ABORT_S, RankNews, TrainingActor
from workers.trainer.job import TrainingFailed, TrainingJob, TrainingResult, TrainingSuperseded
from workers.trainer.news import NewsCallback, TrainingNews, ignore_news, last_word
from workers.trainer.standing_checkpoints import last_whole_checkpoint, newest_attempt, read_metrics

NEWS_POLL_S = 1.0  # news is shown every two seconds; the end is noticed at once
READ_S = 10.0  # the actor's answer is waited for; then Ray itself is looked at

# Ray Train's controller: notice a dead rank soon, write nothing, leave the ranks in the caller's folder, and start no actor
# that tells ranks of a coming preemption, which these do not listen for: each costs a second and a half.
CONTROLLER_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
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
    warnings: list[str] = []
    stands = _samples_that_stand(job)
    if stands == job.last_samples:
        stands = _samples_that_stand(job, checked_here())  # the ranks, which read what is damaged, tell of it
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


def _samples_that_stand(job: TrainingJob, checked: CheckedFiles | None = None) -> int:
    last = last_whole_checkpoint(open_store(job.store), job.folder, last_samples=job.last_samples, checked=checked)
    return last.samples if last else 0


class RanksFailed(TrainingFailed):
    """Ray Train gave up after compute.max_restarts."""


class ControllerLost(TrainingFailed):
    """A process of Ray Train's own has died, with which it loses its ranks: a new one takes their place."""


class _Supervisor:
    """The driver's side: shows what the actor hears, and ends everything on a fatal word, a stall or an interrupt."""

    def __init__(self, job: TrainingJob, compute: Compute, report: ProgressCallback, tell: NewsCallback, stands: int):
        self.job, self.compute, self.tell = job, compute, tell
        self.meter = ProgressMeter(job.last_samples, "samples", report, already_done=stands)

    def run(self, open_loader: Any) -> None:
        training_actor = ray.remote(
            num_cpus=0,
            scheduling_strategy=on_this_node(),  # Ray Train puts its own such actors beside it
            concurrency_groups={"fit": 1, "abort": 1},  # all else takes turns in one thread, in the order it was sent
            runtime_env={"env_vars": CONTROLLER_ENV},
        )(TrainingActor)
        actor = training_actor.remote()
        label = f"sd3-train-{uuid.uuid4().hex}"
        finished = actor.fit.options(concurrency_group="fit").remote(self.job, self.compute, label, open_loader)
        try:
            news = self._watch(actor, finished)
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
                _end(actor, finished, label)

    def _watch(self, actor: Any, finished: Any) -> RankNews:
        news, heard_at = RankNews(), time.monotonic()
        while True:
            ended, _ = ray.wait([finished], timeout=NEWS_POLL_S)
            check_ray()
            answer = _read(actor)
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
            self.meter.update(
                news.samples or self.meter.done, last_word(news.note, silent_s, self.compute.stall_timeout_s)
            )
            if ended and answer:
                return news

    def _warnings(self, news: RankNews) -> list[str]:
        restarts = [
            f"{self.job.phase}: a rank was lost; went on from {samples:,} samples" for _, samples in news.began[1:]
        ]
        return [*news.warnings, *restarts]


def _read(actor: Any) -> RankNews | None:
    """What the actor knows; None where it is too busy to say."""
    try:
        return ray.get(actor.read.remote(), timeout=READ_S)
    except GetTimeoutError:
        return None


def _end(actor: Any, finished: Any, label: str) -> None:
    """Ends whatever of this training still runs, and gives its resources back.

    Ray Train's own cleaner of placement groups needs the dashboard; without it a killed controller's groups would stay.
    """
    with suppress(RayError):
        if not ray.wait([finished], timeout=0)[0]:
            ray.get(actor.abort.options(concurrency_group="abort").remote(), timeout=ABORT_S)
    ray.kill(actor)
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(label) and group["state"] != "REMOVED":
            with suppress(ValueError):  # it has gone since it was listed
                ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
