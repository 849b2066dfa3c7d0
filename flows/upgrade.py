"""The upgrade guard: names what would be made again because a format rose.

Whatever a user changed is made again without a question, and so is what was never made. What a version would make again
is told first, and waits for `--remake` (a deployment's parameter `remake`): runs/RUN/remake.json keeps the word, so that a
run that is stopped half-way does not ask again. The old objects stay where they are: the version before goes on with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from flows.standing import OLDER, StandingPart, standing_parts
from sd3core import specs
from sd3core.checkpoint_record import METRICS_FILE, CheckpointRef, list_checkpoints
from sd3core.data.manifest import read_manifest
from sd3core.data.provenance import provenance_path, read_provenance
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError, UserError
from sd3core.recipe import Recipe
from sd3core.specs import MANIFEST, STAGES, remake_path
from sd3core.towers.artifact import read_towers
from sd3core.words import GB, MB, counted, format_seconds


class RemakeNeeded(UserError):
    """A version's formats differ from those of what stands, and nobody has said that it may be made again."""


class Permission(BaseModel):
    """runs/RUN/remake.json: what the user has said of a run."""

    model_config = ConfigDict(frozen=True)

    allowed: list[str] = []  # changes, as parts name them
    stages: dict[str, str] = {}  # that --from-stage made again, whatever rose: stage -> the version's numbers then

    def asks_of(self, parts: list[StandingPart]) -> list[StandingPart]:
        return [part for part in parts if self.stages.get(part.stage) != specs.version_numbers()]

    def covers(self, change: str) -> bool:
        """Whether a change is allowed. One whose first number is not known ("older") is the same as one to that number."""
        begin, _, end = change.partition(" -> ")
        kind, older = begin.rpartition(" ")[0], begin.endswith(f" {OLDER}")
        same = [other for other in self.allowed if other.startswith(f"{kind} ") and other.endswith(f" -> {end}")]
        return change in same or any(older or other.startswith(f"{kind} {OLDER} ") for other in same)

    def from_stage(self, first: str) -> Permission:
        stages = dict.fromkeys(STAGES[STAGES.index(first) :], specs.version_numbers())
        return self.model_copy(update={"stages": self.stages | stages})


def check_upgrade(
    recipe: Recipe, store: Store, remake: bool, up_to: str = STAGES[-1], from_stage: str | None = None
) -> None:
    """Raises RemakeNeeded where a version makes again what stands, unless `remake` says that it may, now or earlier.

    `up_to`: the last stage that is asked for. `from_stage`: the user's wish that this stage and those after it are made again:
    of them nothing is asked, now or when what comes before them has been made.
    """
    path = remake_path(recipe.run)
    before = _permission(store, path)
    permission = before.from_stage(from_stage) if from_stage else before
    parts = permission.asks_of(standing_parts(recipe, store, up_to))
    changes = {change for part in parts for change in part.changes}
    if not all(map(before.covers, changes)):
        if not remake:
            raise RemakeNeeded(_told(recipe, store, parts))
        permission = permission.model_copy(update={"allowed": sorted(changes | set(before.allowed))})
    if permission != before:
        store.put_json(path, permission.model_dump(mode="json", exclude_defaults=True))


def _permission(store: Store, path: str) -> Permission:
    try:
        return Permission.model_validate(store.get_json(path))
    except (StoreError, ValidationError):
        return Permission()


def _told(recipe: Recipe, store: Store, parts: list[StandingPart]) -> str:
    changes = dict.fromkeys(change for part in parts for change in part.changes)
    again = [part for part in parts if part.status == "upgrade"]
    stays = dict.fromkeys(part.name for part in parts if part.status == "stands")
    estimate = _estimate(recipe)
    costs = [remaking(recipe, store, part, estimate) for part in again]
    hours = [cost.hours for cost in costs]
    unknown = f", without {counted(hours.count(None), 'part')} whose time nobody knows" if None in hours else ""
    return (
        f"run {recipe.run}: with this version {', '.join(changes)} rose, so that this would be made again:"
        f" {', '.join(dict.fromkeys(part.name for part in again))} ({_size(sum(cost.bytes for cost in costs))}, about"
        f" {format_seconds(3600 * sum(filter(None, hours)))}{unknown}); this stays: {', '.join(stays) or 'nothing else'}; what stands is"
        " not removed; the same command with --remake, or a deployment's parameter remake=true, goes on"
    )


def _size(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / MB:,.1f} MB"


def print_upgrade(recipe: Recipe, store: Store, console: Console) -> None:
    """Prints for `sd3 plan` nothing where no format rose, else a row for each part and the line that other commands stop with."""
    try:
        recipe = settle_precisions(recipe, store)
        parts = standing_parts(recipe, store)
    except UserError as error:
        console.print()
        console.print(f"what stands was not looked at: {error}", soft_wrap=True, highlight=False)
        return
    if not any(part.changes for part in parts):
        return
    table = Table(box=None, pad_edge=False)
    for column in ("what stands", "with this version", "size", "time"):
        table.add_column(column, justify="right" if column in ("size", "time") else "left")
    estimate = _estimate(recipe)
    for part in parts:
        if part.status == "stands":
            table.add_row(part.name, "stays", "", "")
        elif part.status == "upgrade":
            cost = remaking(recipe, store, part, estimate)
            why = ", ".join(part.changes) or "follows"
            needed = "not known" if cost.hours is None else format_seconds(3600 * cost.hours)
            table.add_row(part.name, f"made again: {why}", _size(cost.bytes), needed)
    console.print()
    console.print(table)
    console.print(_told(recipe, store, parts), soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Remaking:
    """What making a part again costs."""

    bytes: int
    hours: float | None  # None: not recorded


def _estimate(recipe: Recipe) -> dict[str, float | None]:
    from sd3core.costs.stages import stage_costs  # loads torch, which is needed only where a format rose

    return {cost.name: cost.hours for cost in stage_costs(recipe)}


def remaking(recipe: Recipe, store: Store, part: StandingPart, estimate: dict[str, float | None]) -> Remaking:
    """What making a part again costs: the bytes that stand, and the hours they took; else the plan's `estimate`."""
    sizes = [_standing(recipe, store, part, folder) for folder in part.folders]
    hours = [size.hours for size in sizes]
    size = sum(size.bytes for size in sizes)
    return Remaking(size, estimate.get(part.name) if None in hours else sum(hours))


def _training_hours(store: Store, last: CheckpointRef) -> float | None:
    """Hours of a training, by the median rate of the last checkpoint's rows."""
    try:
        rows = [json.loads(line) for line in store.get(f"{last.folder}/{METRICS_FILE}").splitlines()]
        rates = [row["samples_per_s"] for row in rows if row.get("samples_per_s")]
    except (StoreError, ValueError, AttributeError):
        return None
    return last.samples / median(rates) / 3600 if rates else None


def _standing(recipe: Recipe, store: Store, part: StandingPart, folder: str) -> Remaking:
    if not store.exists(f"{folder}/{MANIFEST}"):  # checkpoints, scores
        done = list_checkpoints(store, folder)
        return Remaking(
            sum(entry.size for entry in store.list(folder)), _training_hours(store, done[-1]) if done else None
        )
    try:
        manifest = read_towers(store, folder) if part.stage == "towers" else read_manifest(store, folder)
    except DataError:
        return Remaking(0, None)
    made_by = read_provenance(store, provenance_path(folder, manifest.digest))
    if made_by is None or not made_by.made or made_by.seconds is None:
        return Remaking(manifest.bytes, None)
    whole = len(manifest.towers if part.stage == "towers" else manifest.shards)
    return Remaking(manifest.bytes, made_by.seconds * whole / made_by.made / 3600)
