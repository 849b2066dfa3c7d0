"""Runs one stage: opens the session, reports progress, ends with an outcome.

The pipeline and the summary read the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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
from sd3core.specs import fingerprint


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


@dataclass(frozen=True)
class StageOutcome:
    """What a stage leaves behind: where its manifest stands, its digest, and whether anything had to be done."""

    name: str
    manifest: str  # URI
    digest: str
    seconds: float
    state: Literal["done", "skipped"]
    reason: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class StageRun:
    """What a stage's flow works with."""

    name: str
    recipe: Recipe
    store: Store
    report: StageReporter
    log: Log
    started: float = field(default_factory=time.monotonic)
    outcome: StageOutcome | None = None
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
        *,
        manifest: str,
        digest: str,
        skipped: bool,
        reason: str,
        table: list[dict[str, object]],
        second_table: list[dict[str, object]] | None = None,
        warnings: list[str] | None = None,
        pictures: dict[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """Logs the warnings that were not logged when they came, shows the tables and pictures in the UI, and returns the
        outcome as the flow's result.
        """
        warnings = warnings or []
        for warning in dict.fromkeys(warnings):
            if warning not in self.logged:
                self.log.warning(printable(warning))
        if skipped:
            self.report.skipped(reason)
        self.outcome = StageOutcome(
            name=self.name,
            manifest=self.store.uri(manifest),
            digest=digest,
            seconds=round(time.monotonic() - self.started, 1),
            state="skipped" if skipped else "done",
            reason=reason,
            warnings=warnings,
        )
        self.log.info("%s %s in %.1f s: %s", self.name, self.outcome.state, self.outcome.seconds, printable(reason))
        title = f"{self.name}: {self.outcome.state} ({reason})"
        publish(self.name, title, [table, second_table or []], warnings, pictures)
        return self.outcome.to_dict()

    def finish_parts(self, results: dict[str, Any], **shown: Any) -> dict[str, Any]:
        """Ends a stage that makes several manifests: the digest covers all of them, the manifest named is the last.

        Its warnings are told where the run is followed: a later stage may fail, and no summary would have them.
        """
        warnings = [warning for result in results.values() for warning in result.warnings]
        for warning in warnings:
            self.warn(warning)
        parts = {name: result.manifest.digest for name, result in results.items()}
        reasons = sorted({result.reason for result in results.values()})
        return self.finish(
            manifest=list(results.values())[-1].manifest.path,
            digest=next(iter(parts.values())) if len(parts) == 1 else fingerprint(parts),
            skipped=all(result.skipped for result in results.values()),
            reason="; ".join(reasons),
            warnings=warnings,
            **shown,
        )


@contextmanager
def stage(name: str, recipe: str, overrides: list[str] | None, remake: bool = False) -> Iterator[StageRun]:
    """`remake`: what stands may be made again where a format rose with this version."""
    log, alone = get_run_logger(), not in_session()
    with session(recipe, overrides) as opened, StageReporter(name, str(runtime.flow_run.id), log) as reporter:
        if alone:  # else the pipeline asks
            check_upgrade(opened.recipe, opened.store, remake, up_to=name)
        yield StageRun(name, opened.recipe, opened.store, reporter, log)
