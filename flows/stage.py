"""Runs one stage: opens the session, reports progress, ends with an outcome.

The pipeline and the summary read that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.logging import get_run_logger

from flows.local.recipes import known_recipes
from flows.session import in_session, session
from flows.ui.artifacts import Log, StageReporter, publish
from flows.upgrade import check_upgrade
from flows.upstream import Upstream
from sd3core.data.store import Store
from sd3core.recipe import Recipe
from sd3core.shown_text import printable
from workers.stage import StageResult


def run_name() -> str:
    """What a run is called in the UI: its flow, its recipe, and the recipe's run where another is asked for: "pretrain mini"."""
    parameters = runtime.flow_run.parameters
    names = {source: name for name, source in known_recipes().items()}
    words = [runtime.flow_run.flow_name, names.get(parameters["recipe"], Path(parameters["recipe"]).stem)]
    runs = [value for key, _, value in (o.partition("=") for o in parameters.get("overrides") or []) if key == "run"]
    return printable(" ".join([*words, *(value.strip("\"'") for value in runs[-1:])]))


# The store alone decides what is done (design, sections 5 and 6): Prefect neither caches nor keeps results.
FLOW_OPTIONS: dict[str, Any] = {
    "flow_run_name": run_name,
    "persist_result": False,
    "retries": 0,
    "validate_parameters": True,
}


@dataclass
class StageRun:
    """What a stage's flow works with."""

    name: str
    recipe: Recipe
    store: Store
    report: StageReporter
    log: Log
    started: float = field(default_factory=time.monotonic)
    logged: list[str] = field(default_factory=list)  # warnings

    @cached_property
    def upstream(self) -> Upstream:
        """What the stages before left. Every stage has its own, also in a pipeline: it finds what those before it made there."""
        return Upstream(self.recipe, self.store)

    def warn(self, message: str) -> None:
        """A warning while the stage works, once: in the run's log, and where the run is followed."""
        if message not in self.logged:
            self.logged.append(message)
            self.report.warn(message)

    def finish(
        self,
        result: StageResult,
        tables: Sequence[list[dict[str, object]]] = (),
        pictures: dict[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """Tells what was not told yet, shows the tables and pictures in the UI, and returns the flow's result: where the
        manifest stands, its digest, and whether anything had to be done. The pipeline and the summary read it.
        """
        for warning in result.warnings:
            self.warn(warning)
        for note in dict.fromkeys(result.notes):
            if note not in self.logged:
                self.log.warning(printable(note))
        if result.skipped:
            self.report.skipped(result.reason)
        state, seconds = "skipped" if result.skipped else "done", round(time.monotonic() - self.started, 1)
        said = [*result.warnings, *result.notes]
        self.log.info("%s %s in %.1f s: %s", self.name, state, seconds, printable(result.reason))
        publish(self.name, f"{self.name}: {state} ({result.reason})", tables, said, pictures)
        return {
            "name": self.name,
            "manifest": self.store.uri(result.path),
            "digest": result.digest,
            "seconds": seconds,
            "state": state,
            "reason": result.reason,
            "warnings": said,
        }


@contextmanager
def stage(name: str, recipe: str, overrides: list[str] | None, remake: bool = False) -> Iterator[StageRun]:
    """`remake`: what stands may be made again where a format rose with this version."""
    log, alone = get_run_logger(), not in_session()
    with session(recipe, overrides) as opened, StageReporter(name, str(runtime.flow_run.id), log) as reporter:
        if alone:  # else the pipeline asks
            check_upgrade(opened.recipe, opened.store, remake, up_to=name)
        yield StageRun(name, opened.recipe, opened.store, reporter, log)
