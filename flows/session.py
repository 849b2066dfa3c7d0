"""Opens what a flow run stands on: recipe, store, the run's lock, Ray.

A record says that the process lives.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from prefect import runtime

from flows.local.home import ensure, home, lock_holder, run_store
from flows.local.processes import Process
from flows.local.runs import Reads, remember_process, take_cancellation
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.files.local_paths import PROJECT
from sd3core.loopback import keep_loopback_direct
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.ray_room import gpus_have_bf16
from workers.ray_session import living_nodes, ray_when_needed

LOCK_SECONDS = 60


@dataclass(frozen=True)
class Session:
    recipe: Recipe
    store: Store


_current: ContextVar[Session | None] = ContextVar("session", default=None)


class RunBusyError(UserError):
    """Another process works on the same run."""


class RunCancelledError(UserError):
    """The run was cancelled while its process was still to come."""


def in_session() -> bool:
    """Whether a pipeline's session is open, which its stages join."""
    return _current.get() is not None


@contextmanager
def session(recipe: str, overrides: list[str] | None) -> Iterator[Session]:
    """Opens a session, or joins the one of the pipeline that this stage runs in."""
    joined = _current.get()
    if joined is not None:
        yield joined
        return
    os.environ["SD3_HOME"] = str(home())  # whole, before the folder changes
    os.chdir(PROJECT)  # the process began where Prefect finds no settings of others, and Ray's would begin there too
    keep_loopback_direct()
    loaded = load_recipe(recipe, overrides)
    store = run_store(loaded)
    remember_process(runtime.flow_run.id, Process.of(os.getpid()), Reads.of(loaded))
    if take_cancellation(runtime.flow_run.id):
        raise RunCancelledError("this run was cancelled before it began")
    with run_lock(store.url, loaded.run), ray_when_needed(loaded.compute):
        nodes_have = lambda: gpus_have_bf16(living_nodes(), loaded.compute.autoscaling)
        opened = Session(settle_precisions(loaded, store, nodes_have), store)
        token = _current.set(opened)
        try:
            yield opened
        finally:
            _current.reset(token)


@contextmanager
def run_lock(store_url: str, run: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """One process at a time works on a run. The system frees the lock when the process ends, however it ends.

    RunBusyError where another holds it for so many seconds.
    """
    name = f"{store_url}/{run}".replace("/", "_").replace(":", "")
    path = ensure(home() / "locks") / f"{name[-120:]}.lock"
    with path.open("a+") as lock:
        deadline = time.monotonic() + seconds
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise RunBusyError(
                    f"run {run}: process {lock_holder(lock)[0]} works on it; wait for it, or end it, and start this again"
                )
            time.sleep(0.5)
        lock.truncate(0)
        lock.write(f"{os.getpid()} {run}")
        lock.flush()
        yield


def _locked(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
