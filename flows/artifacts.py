"""What a stage shows in Prefect's UI: its progress while it works, a table and small pictures at the end."""

from __future__ import annotations

import base64
import threading
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from sd3core.progress import Progress

POST_SECONDS = 1.0
PROGRESS_KEY = "progress"


class StageReporter:
    """Takes every Progress at once and posts the newest to the run's progress artifact, once a second.

    Posting is on a thread of its own: neither a slow server nor one that is being restarted holds up the work. What could
    not be posted is posted with the next tick.
    """

    def __init__(self, stage: str, flow_run_id: str) -> None:
        self._stage, self._flow_run_id = stage, flow_run_id
        self._latest: Progress | None = None
        self._posted: Progress | None = None
        self._artifact: UUID | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._post_until_stopped, name=f"{stage}-progress", daemon=True)

    def __call__(self, progress: Progress) -> None:
        self._latest = progress

    def __enter__(self) -> StageReporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _post_until_stopped(self) -> None:
        while not self._stop.wait(POST_SECONDS):
            self._try_to_post()
        self._try_to_post()

    def _try_to_post(self) -> None:
        progress = self._latest
        if progress is None or progress == self._posted:
            return
        try:
            self._post(progress)
            self._posted = progress
        except (httpx.HTTPError, PrefectException, OSError):
            return  # the server is away: the next tick tries again, the work goes on

    def _post(self, progress: Progress) -> None:
        percent = 100.0 * progress.done / max(progress.total, 1)
        with get_client(sync_client=True) as client:
            if self._artifact is None:
                created = client.create_artifact(
                    ArtifactCreate(
                        key=f"{self._stage.replace('_', '-')}-{PROGRESS_KEY}",
                        type="progress",
                        description=progress.line(),
                        data=percent,
                        flow_run_id=UUID(self._flow_run_id),
                    )
                )
                self._artifact = created.id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(data=percent, description=progress.line()))


def publish(
    stage: str,
    title: str,
    table: list[dict[str, object]],
    warnings: list[str],
    pictures: dict[str, bytes] | None = None,
) -> None:
    """The stage's result as one markdown artifact. `pictures`: caption -> PNG or JPEG bytes, kept small by the caller."""
    parts = [f"## {title}", markdown_table(table), "\n".join(f"- warning: {warning}" for warning in warnings)]
    for caption, image in (pictures or {}).items():
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        parts.append(f"**{caption}**\n\n![{caption}](data:image/{kind};base64,{base64.b64encode(image).decode()})")
    try:
        create_markdown_artifact(key=f"{stage}-result", markdown="\n\n".join(parts), description=title)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("the result could not be shown in the UI (%s); it stands in the store", error)


def markdown_table(rows: list[dict[str, object]]) -> str:
    if not rows:
        return ""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += [
        "| " + " | ".join(str(row.get(column, "")).replace("|", "\\|") for column in columns) + " |" for row in rows
    ]
    return "\n".join(lines)
