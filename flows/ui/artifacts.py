"""Writes a stage's progress, table and small pictures into Prefect's UI."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from flows.local.prefect_client import prefect_client
from sd3core.progress import Progress
from sd3core.shown_text import markdown_text, printable

POST_SECONDS = 2.0  # as often as the terminal asks
WARNINGS_SHOWN = 20  # below the progress, the newest: a folder of images may be told of in a dozen at once
SKIPPED = "skipped: "  # how the progress of a stage that found nothing to do begins; a reason follows
PROGRESS_KEY = "progress"
NOT_POSTED = (httpx.HTTPError, PrefectException, OSError)

Log = logging.Logger | logging.LoggerAdapter[Any]
Shown = tuple[Any, str]  # an artifact's data and description
Look = Callable[[], Shown | None]  # what to show now; None: nothing yet


class LiveArtifact:
    """One artifact of a run that follows its work: created with the first thing to show, then updated in place."""

    def __init__(self, key: str, kind: str, flow_run_id: str, look: Look, seconds: float) -> None:
        self.key, self.kind, self.seconds = artifact_key(key), kind, seconds
        self._flow_run_id, self._look = UUID(flow_run_id), look
        self._id: UUID | None = None
        self._posted: Shown | None = None
        self._looked_at = -seconds

    def post(self, *, now: bool = False) -> None:
        """Posts what is new: the first thing at once, then at most every `seconds`.

        What the server does not take is posted the next time.
        """
        if not now and time.monotonic() - self._looked_at < self.seconds:
            return
        shown = self._look()
        if shown is None:
            return
        self._looked_at = time.monotonic()
        if shown == self._posted:
            return
        data, description = shown
        try:
            with prefect_client() as client:
                if self._id is None:
                    fields = {"key": self.key, "type": self.kind, "data": data, "description": description}
                    self._id = client.create_artifact(ArtifactCreate(**fields, flow_run_id=self._flow_run_id)).id
                else:
                    client.update_artifact(self._id, ArtifactUpdate(data=data, description=description))
            self._posted = shown
        except NOT_POSTED:
            return  # the server is away: the work goes on


class StageReporter:
    """Takes every Progress at once and posts the newest to the run's progress artifact every POST_SECONDS.

    Its description is the progress in one line, and a line for each of the last warnings that came while the stage worked.
    Posting is on a thread of its own: neither a slow server nor one that is being restarted holds up the work. What went
    wrong is a warning in the run's log at once.
    """

    def __init__(self, stage: str, flow_run_id: str, log: Log) -> None:
        self._stage, self._flow_run_id, self._log = stage, flow_run_id, log
        self._latest: Progress | None = None
        self._skipped = ""
        self._warnings: list[str] = []
        self._artifacts: list[LiveArtifact] = []
        self._show(f"{stage}-{PROGRESS_KEY}", "progress", self._progress, POST_SECONDS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._post_until_stopped, name=f"{stage}-progress", daemon=True)

    def __call__(self, progress: Progress) -> None:
        self._latest = progress
        if progress.warning:
            self._log.warning(printable(progress.warning))

    def warn(self, message: str) -> None:
        """Shows what a person who follows the run should know at once."""
        self._warnings = [*self._warnings, printable(message)]
        self._log.warning(printable(message))

    def skipped(self, reason: str) -> None:
        self._skipped = f"{SKIPPED}{printable(reason)}"

    def show(self, key: str, look: Look, seconds: float) -> None:
        """Keeps a markdown artifact up to date; `look` is called on the posting thread."""
        self._show(key, "markdown", look, seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._latest and error is None:
            self._latest = replace(self._latest, note="")  # what was done last says nothing of the whole
        self._stop.set()
        self._thread.join(timeout=30)

    def _show(self, key: str, kind: str, look: Look, seconds: float) -> None:
        self._artifacts = [*self._artifacts, LiveArtifact(key, kind, self._flow_run_id, look, seconds)]

    def _progress(self) -> Shown | None:
        if self._skipped:
            return 100.0, self._skipped
        if self._latest is None:
            return None
        lines = [printable(self._latest.line()), *self._warnings[-WARNINGS_SHOWN:]]
        return 100.0 * self._latest.done / max(self._latest.total, 1), "\n".join(lines)

    def _post_until_stopped(self) -> None:
        while not self._stop.wait(POST_SECONDS):
            self._post_all()
        self._post_all(now=True)

    def _post_all(self, *, now: bool = False) -> None:
        for artifact in self._artifacts:
            try:
                artifact.post(now=now)
            except Exception as error:  # what cannot be drawn costs its own artifact, never the others or the work
                self._artifacts = [other for other in self._artifacts if other is not artifact]
                self._log.warning(
                    "%s is no longer shown in the UI (%s: %s)",
                    artifact.key,
                    type(error).__name__,
                    printable(str(error)),
                )


def publish(
    stage: str,
    title: str,
    tables: Sequence[list[dict[str, object]]],
    warnings: list[str],
    pictures: dict[str, bytes] | None = None,
) -> None:
    """The stage's result as one markdown artifact. `pictures`: caption -> PNG or JPEG bytes, kept small by the caller."""
    said = "\n".join(f"- warning: {markdown_text(warning)}" for warning in warnings)
    parts = [f"## {markdown_text(title)}", *map(markdown_table, tables), said]
    for caption, image in (pictures or {}).items():
        parts.append(f"**{markdown_text(caption)}**\n\n{markdown_picture(caption, image)}")
    try:
        create_markdown_artifact(key=f"{stage}-result", markdown="\n\n".join(parts), description=printable(title))
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("the result could not be shown in the UI (%s); it stands in the store", error)


def artifact_key(name: str) -> str:
    """Prefect takes small letters, digits and dashes."""
    return name.replace("_", "-").replace(".", "-")


def markdown_picture(caption: str, image: bytes) -> str:
    """A data URL: the UI has no other way to a file of the store."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"![{markdown_text(caption)}](data:image/{kind};base64,{base64.b64encode(image).decode()})"


def markdown_table(rows: list[dict[str, object]]) -> str:
    if not rows:
        return ""
    columns: list[object] = list(rows[0])
    lines = [_table_row(columns), "|" + " --- |" * len(columns)]
    return "\n".join(lines + [_table_row([row.get(str(column), "") for column in columns]) for row in rows])


def _table_row(cells: list[object]) -> str:
    return f"| {' | '.join(markdown_text(str(cell)) for cell in cells)} |"
