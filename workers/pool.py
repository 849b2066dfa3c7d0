"""Maps tasks over Ray actors: retries, quarantine, replacement, a watchdog.

Retries have a cap, and what is quarantined has its reason.

A worker is a plain class without a ray import: `__init__` loads what it needs once, `__call__(task)` returns a result.
It may keep an attribute `progress` (any comparable value, usually sd3core.progress.Progress): the watchdog then counts
a long task as alive while that value changes. Its class may have `tasks_at_once`: so many threads call one worker, each with a
task of its own, and `progress` is of all of them. Tasks and results travel through Ray, so they hold paths and counts, never
tensors.
"""

from __future__ import annotations

import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from sd3core.data.provenance import Provenance, device_kind, provenance
from sd3core.data.store import is_transient
from sd3core.errors import StopStageError, UserError, error_in_one_line, is_of_the_machine
from workers.ray_room import actors_problem
from workers.ray_session import RayLost, check_ray, drivers_mark, elsewhere, living_nodes, restart_ray

if TYPE_CHECKING:  # the recipe brings torch, which not every worker needs
    from sd3core.recipe import Compute

Task = TypeVar("Task")
POOL_POLL_S = 1.0  # how often workers are asked for their progress
MISSING_MODULE = re.compile(r"(?:ModuleNotFoundError|ImportError): [^\n]*[^\s]")
NODE_IP = re.compile(r"\bip[:=] ?([0-9a-fA-F.:]+[0-9a-fA-F])")
LOST_RAYS = 3  # in a row, without a task that ended between them


class PoolFailed(UserError):
    """No worker could be started or kept."""


@dataclass(frozen=True)
class PoolSettings:
    actors: int
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    max_attempts: int = 3  # of one task, and of loading one worker
    stall_timeout_s: float = 600.0  # without a result or a change of the worker's `progress`
    load_timeout_s: float = 1800.0  # for a worker's process to be placed and its __init__ to end
    autoscaling: bool = False  # the cluster adds nodes: what those of now have room for says nothing
    keys: Mapping[str, str] = field(default_factory=dict)  # of these numbers, where the recipe has them for this stage

    @classmethod
    def of(cls, compute: Compute, **changes: Any) -> PoolSettings:
        """`compute`: as the stage has it."""
        names = ("actors", "cpus_per_actor", "gpus_per_actor", "stall_timeout_s", "autoscaling")
        keys = {name: compute.key(name) for name in names}
        return cls(**{name: getattr(compute, name) for name in names} | {"keys": keys} | changes)

    def key(self, name: str) -> str:
        """Where the recipe says a number, for messages."""
        return self.keys.get(name, f"compute.{name}")


@dataclass(frozen=True)
class Outcome(Generic[Task]):
    """What became of one task: a result, or the reason of its last attempt (quarantined)."""

    task: Task
    result: Any = None
    error: str | None = None
    attempts: int = 1
    device: str = ""  # kind of what the worker ran on
    seconds: float = 0.0  # of the last attempt, as a part of its worker's time


def map_over_actors(
    worker_class: type,
    worker_kwargs: dict[str, Any],
    tasks: Sequence[Task],
    settings: PoolSettings,
    report: Callable[[Outcome[Task], int, int], None] | None = None,
    watch: Callable[[Task, Any], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Outcome[Task]]:
    """worker_class(**worker_kwargs)(task) for every task; outcomes in the order of the tasks.

    Each actor loads once and has one task at a time, or as many as its worker's `tasks_at_once`. A task that raises, whose
    process dies or that stalls is tried again, up to settings.max_attempts, then given up with its reason (a UserError keeps
    its message); where a process dies at several, nobody knows which it was, and each is tried again alone. `report(outcome,
    done, total)` is called as each task ends; `watch(task, progress)` about once a second with what a busy worker
    shows; `tell` hears that Ray itself has died and was started again, after which what had not ended begins anew.
    Raises PoolFailed when no worker can be loaded, and at once when loading raises a UserError that stays, a task raises a
    StopStageError or no node of Ray has room for a worker; RayLost when Ray dies again and again.
    """
    if not tasks:
        return []
    return _Pool(worker_class, worker_kwargs, tasks, settings, report, watch, tell).run()


def made_by(outcomes: Sequence[Outcome[Any]], actors: int) -> Provenance:
    """Provenance of what actors have made; its seconds are those of a pool that has work for all of them."""
    made = [outcome for outcome in outcomes if outcome.error is None]
    kinds = sorted({outcome.device for outcome in made} - {""})
    used = max(1, min(actors, len(made)))
    return provenance(" and ".join(kinds) or None, used, made=len(made), seconds=sum(o.seconds for o in made) / used)


class _ActorHost:
    """The only class that is a Ray actor: it loads a plain worker, and returns failures as values."""

    def load(self, worker_class: type, worker_kwargs: dict[str, Any]) -> _Answer:
        """Answers with the kind of device that the worker runs on."""
        self.worker = None

        def loaded() -> str:
            self.worker = worker_class(**worker_kwargs)
            return device_kind("cuda" if ray.get_gpu_ids() else "cpu")

        return _answer(loaded)

    def call(self, task: Any) -> _Answer:
        return _answer(lambda: self.worker(task))

    def progress(self) -> Any:  # in a thread of its own, so that it answers while `call` works
        return getattr(getattr(self, "worker", None), "progress", None)


@dataclass(frozen=True)
class _Answer:
    result: Any = None
    error: str | None = None
    stays: bool = False  # the error: no other worker and no other attempt would do better
    of_the_process: bool = False  # the error: this worker may be of no use for other tasks either
    of_all: bool = False  # the error: no worker would be of use for any task


def _answer(work: Callable[[], Any]) -> _Answer:
    try:
        return _Answer(work())
    except UserError as error:
        of_all = isinstance(error, StopStageError)
        return _Answer(error=f"{error}{elsewhere()}", stays=not is_transient(error), of_all=of_all)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error_in_one_line(error)} ({Path(place.filename).name}:{place.lineno})"
        return _Answer(error=f"{words}{elsewhere()}", of_the_process=of_the_process(error))


def of_the_process(error: Exception) -> bool:
    """Memory or files that have run out, and CUDA: after most of its errors a process can use the GPU no more, whatever it is asked."""
    return is_of_the_machine(error) or "CUDA" in str(error)


@dataclass(eq=False)
class _Call:
    """A task that an actor is at."""

    position: int
    seconds: float = 0.0  # its part of the actor's time: what it shares with other tasks is divided among them


@dataclass(eq=False)
class _Seat:
    """One place in the pool: the actor that sits there now, and what it is doing."""

    actor: Any
    loading: Any  # reference of the running load; None once it has ended
    calls: dict[Any, _Call] = field(default_factory=dict)  # by reference
    device: str = ""
    counted_at: float = 0.0  # the calls' seconds
    failed_loads: int = 0
    progress: Any = None
    progress_pending: Any = None
    alive_at: float = field(default_factory=time.monotonic)

    def count_seconds(self) -> None:
        """To be called before a call is added or taken away."""
        now = time.monotonic()
        for call in self.calls.values():
            call.seconds += (now - self.counted_at) / len(self.calls)
        self.counted_at = now


class _Pool(Generic[Task]):
    def __init__(self, worker_class, worker_kwargs, tasks, settings, report, watch, tell) -> None:
        self.load_arguments = (worker_class, worker_kwargs)
        self.name = worker_class.__name__
        self.tasks: Sequence[Task] = tasks
        self.settings: PoolSettings = settings
        self.report, self.watch, self.tell = report, watch, tell
        self.at_once = getattr(worker_class, "tasks_at_once", 1)
        self.alone: set[int] = set()  # positions of tasks that were lost together with others
        self.waiting = deque(range(len(tasks)))
        self.attempts = [0] * len(tasks)
        self.outcomes: dict[int, Outcome[Task]] = {}
        self.seats: list[_Seat] = []
        self.last_load_error = ""

    def run(self) -> list[Outcome[Task]]:
        if problem := actors_problem(self.settings, living_nodes()):
            raise PoolFailed(problem)
        lost_rays = 0
        while True:
            ended = len(self.outcomes)
            try:
                return self._run()
            except RayLost as lost:
                lost_rays = lost_rays + 1 if len(self.outcomes) == ended else 1
                if lost_rays > LOST_RAYS:
                    raise
                self._take_back(str(lost))
                restart_ray(lost)
                if self.tell:
                    self.tell(f"{lost}; Ray was started again, and what was at work begins anew")

    def _run(self) -> list[Outcome[Task]]:
        """Runs what is left on one Ray. Its actors are ended with it where it dies, so they are asked nothing more."""
        self.actor_class = self._actor_class()  # exported to this Ray's own tables
        try:
            self.seats = [self._seated() for _ in range(min(self.settings.actors, len(self.waiting)))]
            while len(self.outcomes) < len(self.tasks):
                check_ray()
                busy = {
                    reference: seat
                    for seat in self.seats
                    for reference in (seat.calls if seat.loading is None else [seat.loading])
                }
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=POOL_POLL_S)
                for reference in ready:
                    self._take(busy[reference], reference)
                self._look_at_progress()
                self._give_out()
        except RayLost:
            raise
        except BaseException:
            self._dismiss()
            raise
        self._dismiss()
        return [self.outcomes[i] for i in range(len(self.tasks))]

    def _actor_class(self) -> Any:
        threads = str(max(1, int(self.settings.cpus_per_actor)))
        return ray.remote(
            num_cpus=self.settings.cpus_per_actor,
            num_gpus=self.settings.gpus_per_actor,
            max_restarts=0,  # replaced here, where the attempt is counted
            concurrency_groups={"watch": 1, "tasks": self.at_once},
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | drivers_mark()},
        )(_ActorHost)

    def _dismiss(self) -> None:
        for seat in self.seats:
            ray.kill(seat.actor)

    def _take_back(self, reason: str) -> None:
        """What was at work when Ray died: an attempt each, for it may be what killed Ray."""
        at_work = [call.position for seat in self.seats for call in seat.calls.values()]
        self.seats = []
        for position in at_work:
            self._failed(position, reason)

    def _seated(self, failed_loads: int = 0) -> _Seat:
        actor = self.actor_class.remote()
        return _Seat(actor, actor.load.remote(*self.load_arguments), failed_loads=failed_loads)

    def _take(self, seat: _Seat, reference: Any) -> None:
        """The running load or a call of this seat has ended: with an answer, or with the actor's death."""
        try:
            answer = ray.get(reference)
        except RayActorError as error:
            check_ray()
            self._lost(seat, why_it_died(error))
            return
        except RayError as error:  # a task or result that cannot be pickled, a lost object
            answer = _Answer(error=_missing_module(error) or error_in_one_line(error))
        if answer.of_all:
            raise PoolFailed(answer.error)
        if reference == seat.loading:
            self._take_load(seat, answer)
        elif answer.of_the_process:
            self._lost(seat, answer.error, seat.calls[reference])
        else:
            self._take_result(seat, reference, answer)

    def _take_load(self, seat: _Seat, answer: _Answer) -> None:
        if answer.error is None:
            seat.loading, seat.failed_loads, seat.device = None, 0, answer.result
        elif answer.stays:
            raise PoolFailed(answer.error)
        else:
            self._lost(seat, answer.error)

    def _take_result(self, seat: _Seat, reference: Any, answer: _Answer) -> None:
        seat.count_seconds()
        if reference is next(iter(seat.calls)):  # the oldest: what younger ones do says nothing of it
            seat.alive_at = time.monotonic()
        call = seat.calls.pop(reference)
        position = call.position
        if answer.error is None:
            how = {"attempts": self.attempts[position], "device": seat.device, "seconds": call.seconds}
            self._finish(position, Outcome(self.tasks[position], answer.result, **how))
        else:
            self._failed(position, answer.error)

    def _lost(self, seat: _Seat, reason: str, culprit: _Call | None = None) -> None:
        """The actor is dead, stuck, not loaded or of no more use: an attempt of its tasks is counted, and another actor takes
        the seat. `culprit`: the task that is known to be the cause; then the others' attempts do not count.
        """
        ray.kill(seat.actor)
        self.seats.remove(seat)
        failed_loads = 0
        if seat.loading is not None:
            failed_loads = seat.failed_loads + 1
            self.last_load_error = reason
        if len(seat.calls) > 1:
            self.alone |= {call.position for call in seat.calls.values() if culprit in (None, call)}
        for call in seat.calls.values():
            if culprit in (None, call):
                self._failed(call.position, reason)
            else:
                self.attempts[call.position] -= 1
                self.waiting.append(call.position)
        if failed_loads < self.settings.max_attempts:
            self.seats.append(self._seated(failed_loads))
        elif not self.seats:
            raise PoolFailed(
                f"no {self.name} could be started, after {self.settings.max_attempts} attempts each:"
                f" {self.last_load_error}"
            )

    def _failed(self, position: int, reason: str) -> None:
        attempts = self.attempts[position]
        if attempts < self.settings.max_attempts:
            self.waiting.append(position)  # behind all others: a passing fault may be over by then
        else:
            self._finish(position, Outcome(self.tasks[position], error=reason, attempts=attempts))

    def _finish(self, position: int, outcome: Outcome[Task]) -> None:
        self.outcomes[position] = outcome
        if self.report:
            self.report(outcome, len(self.outcomes), len(self.tasks))

    def _give_out(self) -> None:
        while self.waiting and (seat := self._seat_for(self.waiting[0])) is not None:
            position = self.waiting.popleft()
            self.attempts[position] += 1
            seat.count_seconds()
            if not seat.calls:
                seat.alive_at = time.monotonic()
                seat.progress = seat.progress_pending = None
            # one task at a time stays in the thread that has loaded the worker
            call = seat.actor.call if self.at_once == 1 else seat.actor.call.options(concurrency_group="tasks")
            seat.calls[call.remote(self.tasks[position])] = _Call(position)

    def _seat_for(self, position: int) -> _Seat | None:
        """The seat that takes this task now: one with the fewest. A second task is given only where those that wait are more than
        the seats that have none, some of which may still be loading.
        """
        alone = [seat for seat in self.seats if any(call.position in self.alone for call in seat.calls.values())]
        ready = [seat for seat in self.seats if seat.loading is None and seat not in alone]
        seat = min(ready, key=lambda seat: len(seat.calls), default=None)
        if seat is None or not seat.calls:
            return seat
        without = sum(not other.calls for other in self.seats)
        fits = len(seat.calls) < self.at_once and len(self.waiting) > without and position not in self.alone
        return seat if fits else None

    def _look_at_progress(self) -> None:
        now = time.monotonic()
        for seat in [seat for seat in self.seats if seat.loading is not None or seat.calls]:
            if seat.calls:
                self._ask(seat, now)
            waited = now - seat.alive_at
            if seat.loading is not None and waited > self.settings.load_timeout_s:
                self._lost(
                    seat, f"not loaded after {self.settings.load_timeout_s:g} s ({_resources_left(self.settings)})"
                )
            elif seat.calls and waited > self.settings.stall_timeout_s:
                self._lost(seat, f"no progress for {self.settings.stall_timeout_s:g} s")

    def _ask(self, seat: _Seat, now: float) -> None:
        if seat.progress_pending is None:
            if now - seat.alive_at < POOL_POLL_S:
                return
            seat.progress_pending = seat.actor.progress.options(concurrency_group="watch").remote()
            return
        if not ray.wait([seat.progress_pending], timeout=0)[0]:
            return
        try:
            progress = ray.get(seat.progress_pending)
        except RayError:
            progress = None  # its death shows in the call
        seat.progress_pending = None
        if progress is not None and progress != seat.progress:
            if _of_the_oldest(progress) != _of_the_oldest(seat.progress):
                seat.alive_at = now
            seat.progress = progress
            for call in seat.calls.values() if self.watch else ():
                self.watch(self.tasks[call.position], progress)


def _of_the_oldest(progress: Any) -> Any:
    """Of a worker that is at several tasks the others may wait for this one, which waits for none."""
    return next(iter(progress.items()), None) if isinstance(progress, dict) else progress


def why_it_died(error: RayActorError) -> str:
    """Why a process died, in one line. One that cannot import what it is to run dies before it runs it."""
    memory = " (out of memory)" if "memory" in str(error).lower() else ""
    return _missing_module(error) or f"the worker process died{memory}"


def _missing_module(error: RayError) -> str | None:
    if not (found := MISSING_MODULE.findall(str(error))):
        return None
    node = NODE_IP.search(str(error))
    where = f" on node {node[1]}" if node else ""
    return f"{found[-1]}: Python{where} lacks it; install this project and its lock there, at the same versions"


def _resources_left(settings: PoolSettings) -> str:
    free = ray.available_resources()
    asks = f"{settings.key('actors')} may ask for more"
    return f"free in Ray: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs; {asks}"
