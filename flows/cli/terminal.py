"""Draws the live view of a run: stages, progress, time left and pictures.

Reads Prefect's API and nothing else.

On a terminal one table is redrawn, with the newest picture below it where there are colours; elsewhere (a log, CI) a line is
printed when something changes, at most one a stage every twenty seconds. Warnings that come while a stage works, and the path of
the first picture, are always printed.
"""

from __future__ import annotations

import base64
import builtins
import re
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.cli.terminal_picture import can_show_pictures, half_blocks
from flows.local.prefect_client import AT_ONCE, prefect_client
from flows.local.runs import OtherRecipe, Reads, fail_dead_runs, flow_name, read_stage_runs, what_its_process_read
from flows.local.services import ServiceError, worker_lives
from flows.summary import of_stage
from flows.ui.artifacts import SKIPPED
from sd3core.shown_text import plain_text, printable
from sd3core.specs import ONLY_WHERE_ASKED, STAGES
from sd3core.words import format_seconds

POLL_SECONDS, PICTURE_SECONDS, LINE_SECONDS, SERVER_AWAY_SECONDS = 2.0, 10.0, 20.0, 60.0
# beside table and picture: headings, what is above, the cursor
PICTURE_COLUMNS, PICTURE_MIN_ROWS, LINES_BESIDE = (
    80,
    6,
    4,
)
DATA_URL = re.compile(r"!\[((?:\\.|[^\]\\])*)\]\(data:image/\w+;base64,([^)]+)\)")
EXCEPTION = re.compile(r"^Flow run encountered an exception: (?:([\w.]+): )?")  # Prefect's words before an error's own
FINAL = {StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
STATE_WORDS = {
    StateType.SCHEDULED: "waiting",
    StateType.PENDING: "starting",
    StateType.RUNNING: "running",
    StateType.COMPLETED: "done",
    StateType.FAILED: "failed",
    StateType.CRASHED: "crashed",
    StateType.CANCELLED: "cancelled",
    StateType.CANCELLING: "cancelling",
    StateType.PAUSED: "paused",
}


@dataclass(frozen=True)
class StageView:
    name: str
    state: str
    seconds: float
    progress: str
    warnings: tuple[str, ...] = ()  # that came while it worked, the last few


@dataclass(frozen=True)
class ShownPicture:
    path: str
    image: bytes  # PNG or JPEG
    reading: str = ""  # what it shows where: the words in it are too small for a terminal


@dataclass(frozen=True)
class RunView:
    state: StateType
    message: str
    stages: list[StageView]
    pipeline: bool = True  # else one stage's own run

    @property
    def finished(self) -> bool:
        return self.state in FINAL


def view_run(flow_run_id: UUID) -> RunView:
    """One look at a run and the stage runs it started (a stage run on its own is its own only stage)."""
    with prefect_client() as client:
        run = client.read_flow_run(flow_run_id)
        runs = read_stage_runs(flow_run_id) or [run]
        artifacts = _artifacts(client, flow_run_id, AT_ONCE, type={"any_": ["progress"]})
    lines = {UUID(artifact["flow_run_id"]): artifact["description"] or "" for artifact in reversed(artifacts)}
    stages = [_stage_view(child, flow_name(child.flow_id), lines.get(child.id, "")) for child in runs]
    return RunView(run.state_type or StateType.PENDING, _problem(run), stages, flow_name(run.flow_id) == "pipeline")


def _stage_view(run: FlowRun, name: str, described: str) -> StageView:
    """`described`: of its progress artifact."""
    progress, *warnings = described.splitlines() or [""]
    state = STATE_WORDS.get(run.state_type, "waiting")
    if run.state_type in (StateType.RUNNING, StateType.COMPLETED) and progress.startswith(SKIPPED):
        state, progress = "skipped", progress.removeprefix(SKIPPED)
    seconds = run.estimated_run_time.total_seconds()
    return StageView(name, state, seconds, _problem(run) or progress, tuple(warnings))


def newest_picture(flow_run_id: UUID) -> ShownPicture | None:
    """The newest picture of a run and of the stage runs that it started."""
    with prefect_client() as client:
        return _picture(_artifacts(client, flow_run_id, 1, key={"like_": "-pictures"}))


def _artifacts(client: SyncPrefectClient, flow_run_id: UUID, limit: int, **wanted: Any) -> list[dict[str, Any]]:
    """Artifacts of a run and of the stage runs it started, the newest first. Not client.read_artifacts: where it has no filter it sends
    null, which a server of another installation may refuse (fastapi from 0.151 on).
    """
    its_own = {"any_": [str(flow_run_id)]}
    runs = {"operator": "or_", "id": its_own, "parent_flow_run_id": its_own}
    request = {"flow_runs": runs, "artifacts": wanted, "sort": "UPDATED_DESC", "limit": limit}
    return client.request("POST", "/artifacts/filter", json=request).json()


def _picture(artifacts: list[dict[str, Any]]) -> ShownPicture | None:
    """The picture of the first artifact that shows one and says in its description where the file stands."""
    for artifact in artifacts:
        found = DATA_URL.search(artifact["data"])
        if found:
            return ShownPicture(artifact["description"], base64.b64decode(found.group(2)), plain_text(found.group(1)))
    return None


def follow(flow_run_id: UUID, console: Console, wanted: Reads | None = None) -> RunView:
    """Shows the run until it has ended, and returns the last look. ServiceError if the server stays away, OtherRecipe once its
    process has read another than the `wanted` one.
    """
    redraws = console.is_terminal and not console.is_dumb_terminal
    live = Live(console=console, auto_refresh=False, transient=False) if redraws else None
    printer, pictures, picture_seen = _LinePrinter(console), _Pictures(flow_run_id, console), False
    warned: set[str] = set()
    last_answer = time.monotonic()
    if live:
        live.start()
    try:
        while True:
            if wanted and (reads := what_its_process_read(flow_run_id)):
                if reads != wanted:
                    raise OtherRecipe(f"flow run {flow_run_id}: its process read another recipe")
                wanted = None
            try:
                fail_dead_runs()
                view = view_run(flow_run_id)
                picture = pictures.newest(view.finished)
                last_answer = time.monotonic()
            except httpx.HTTPError:  # away, or busy: it has a minute to come back
                if time.monotonic() - last_answer > SERVER_AWAY_SECONDS:
                    raise ServiceError(
                        "the Prefect server has been away for a minute; the same command starts it and goes on"
                    ) from None
                time.sleep(POLL_SECONDS)
                continue
            if view.state in (StateType.SCHEDULED, StateType.PENDING) and not worker_lives():
                raise ServiceError(
                    "the Prefect worker has ended before it began the run; the same command goes on with it"
                )
            if picture and not picture_seen:
                console.print(f"first pictures: {picture.path}", soft_wrap=True, highlight=False)
                picture_seen = True
            for warning in _warnings(view):
                if warning not in warned:
                    console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
                    warned.add(warning)
            if live:
                live.update(_screen(view, picture, console), refresh=True)
            else:
                printer.show(view)
            if view.finished:
                return view
            time.sleep(POLL_SECONDS)
    finally:
        if live:
            live.stop()


def _warnings(view: RunView) -> list[str]:
    return [of_stage(stage.name, warning) for stage in view.stages for warning in stage.warnings]


def _problem(run: FlowRun) -> str:
    """What went wrong, in the error's own words; one that nobody wrote for a person keeps its class, as `KeyError: 'uri'`."""
    if run.state_type not in (StateType.FAILED, StateType.CRASHED, StateType.CANCELLED) or run.state is None:
        return ""
    message = (run.state.message or run.state.name).strip().splitlines()[0]
    return EXCEPTION.sub(lambda found: f"{found[1]}: " if hasattr(builtins, found[1] or "") else "", message)


def _table(view: RunView) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "time", "progress"):
        table.add_column(column, no_wrap=column != "progress")
    shown = {stage.name: stage for stage in view.stages}
    for name in STAGES if view.pipeline else shown:
        stage = shown.get(name)
        if stage is None and name in ONLY_WHERE_ASKED:
            continue
        if stage is None:
            table.add_row(name, "waiting", "", "")
        else:
            table.add_row(name, stage.state, format_seconds(stage.seconds), stage.progress)
    return table


def _screen(view: RunView, picture: ShownPicture | None, console: Console) -> Group:
    """The table, and the newest picture below it where the terminal has the colours and the room."""
    table = _table(view)
    reading = (
        [Text(printable(picture.reading), no_wrap=True, overflow="ellipsis")] if picture and picture.reading else []
    )
    rows = console.height - table.row_count - LINES_BESIDE - len(reading)
    if picture is None or rows < PICTURE_MIN_ROWS or not can_show_pictures(console):
        return Group(table)
    shown = half_blocks(picture.image, min(console.width, PICTURE_COLUMNS), rows)
    return Group(table, "", shown, *reading)


class _Pictures:
    """A run's newest picture, of some 100 kB: looked for until there is one, then now and then where it can be shown."""

    def __init__(self, flow_run_id: UUID, console: Console) -> None:
        self._flow_run_id, self._can_show = flow_run_id, can_show_pictures(console)
        self._newest: ShownPicture | None = None
        self._looked_at = 0.0

    def newest(self, finished: bool) -> ShownPicture | None:
        """`finished`: the last one is worth a look, whenever the look before was."""
        now = time.monotonic()
        due = self._can_show and (finished or now - self._looked_at >= PICTURE_SECONDS)
        if self._newest is None or due:
            self._newest, self._looked_at = newest_picture(self._flow_run_id) or self._newest, now
        return self._newest


class _LinePrinter:
    """Plain lines for logs: every change of state, and progress now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[str, str, float]] = {}

    def show(self, view: RunView) -> None:
        for stage in view.stages:
            state, progress, when = self._shown.get(stage.name, ("", "", 0.0))
            due = stage.progress != progress and time.monotonic() - when > LINE_SECONDS
            if stage.state != state or due:
                self._console.print(
                    f"{stage.name}: {stage.state}, {format_seconds(stage.seconds)}  {stage.progress}".rstrip(),
                    soft_wrap=True,
                    highlight=False,
                )
                self._shown[stage.name] = (stage.state, stage.progress, time.monotonic())
