"""Calls workers in the test's process, in place of Ray's actors."""

from __future__ import annotations

from contextlib import nullcontext

from sd3core.progress import Progress
from workers.pool import Outcome


def map_in_this_process(worker_class, worker_kwargs, tasks, settings, report=None, watch=None, tell=None):
    worker, outcomes = worker_class(**worker_kwargs), []
    for done, task in enumerate(tasks, start=1):
        try:
            outcomes.append(Outcome(task, worker(task)))
        except Exception as error:
            outcomes.append(Outcome(task, error=str(error)))
        if report:
            report(outcomes[-1], done, len(tasks))
        if watch and isinstance(worker.progress, Progress):
            watch(task, worker.progress)
    return outcomes


def without_ray(patch, *modules) -> None:
    """The stages of these modules work in this process from here on."""
    for module in modules:
        patch.setattr(module, "map_over_actors", map_in_this_process)
        patch.setattr(module, "start_ray", lambda *_: nullcontext())
