"""The upgrade guard: what stands for a recipe and would be made again only because a format rose with this version.

Whatever a user changed is made again without a question, and so is what was never made. What a version would make again
is told first, and waits for `--remake` (a deployment's parameter `remake`): runs/RUN/remake.json keeps the word, so that a
run that is stopped half-way does not ask again. The old objects stay where they are: the version before goes on with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from flows import upstream
from sd3core import specs
from sd3core.checkpoint import METRICS_FILE, CheckpointRef, list_checkpoints, read_done
from sd3core.data.manifest import MANIFEST, read_fields, read_manifest
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError, UserError
from sd3core.format_changes import format_changes
from sd3core.progress import counted, format_seconds
from sd3core.provenance import provenance_path, read_provenance
from sd3core.recipe import Recipe, Training
from sd3core.specs import FORMATS, STAGES, fingerprint
from sd3core.stage_costs import stage_costs
from sd3core.towers import TOWER_FOLDERS, read_towers
from workers.stage_notes import recall_stage

REMADE = "remade"  # in place of a digest that is known when what is upstream is made again
GB, MB = 1e9, 1e6


class RemakeNeeded(UserError):
    """A version's formats differ from those of what stands, and nobody has said that it may be made again."""


@dataclass(frozen=True)
class Part:
    """A stage, or one of the things that it makes, as far as it stands.

    `old`: what names the standing bytes in the fields of what was made from them: a fingerprint, or digests.
    """

    name: str  # as in stage notes: "ingest", "latents.pretrain", "finetune.0"
    stage: str
    status: Literal["stands", "upgrade", "other"]  # other: never made, or made again for another reason
    changes: tuple[str, ...] = ()  # "train format 1 -> 2": its own; none where only what is upstream is made again
    old: frozenset[str] = frozenset()
    folders: tuple[str, ...] = ()  # of what stands and would be made again


@dataclass
class _Look:
    """Goes through the stages in their order; each part is judged by what is known of those before it."""

    recipe: Recipe
    store: Store
    parts: dict[str, Part] = field(default_factory=dict)

    def all(self) -> list[Part]:
        recipe, name = self.recipe, self.recipe.data.name
        self._folders("ingest", "ingest", "raw", f"datasets/{name}/raw", specs.raw_fields(recipe), {})
        small = {"raw": "ingest"} if recipe.towers.small is not None else {}
        self._folders("towers", "towers", "towers", f"towers/{recipe.towers.name}", specs.towers_fields(recipe), small)
        self._captions()
        digests = self._tower_digests()
        text = specs.text_fields(recipe, digests)
        self._folders("text", "encode", "text", f"datasets/{name}/text", text, {"encoders": "towers", "captions": "caption"})
        for key, phase in recipe.phases():
            latents = specs.latents_fields(recipe, phase, digests)
            needs = {"vae": "towers", "raw": "ingest"}
            self._folders(f"latents.{key}", "encode", "latents", f"datasets/{name}/latents", latents, needs)
        for key, phase in recipe.phases():
            self._phase(key, phase)
        self._results()
        return list(self.parts.values())

    def _put(self, name: str, stage: str, status: Any, changes: tuple[str, ...] = (), **known: Any) -> None:
        self.parts[name] = Part(name, stage, status, changes, **known)

    def _folders(
        self, name: str, stage: str, kind: str, parent: str, fields: dict[str, Any], needs: dict[str, str]
    ) -> None:
        """A part whose specs are folders side by side, whoever made them. `needs`: field -> the part that it names."""
        today = f"{parent}/{fingerprint(fields)}"
        ready = all(self.parts[other].status == "stands" for other in needs.values())
        if ready and self.store.exists(f"{today}/{MANIFEST}"):
            return self._put(name, stage, "stands", old=self._names(name, kind, today))
        found = {}
        for spec in self.store.folders(parent):
            old = read_fields(self.store, f"{parent}/{spec}")
            changes = None if old is None else self._changes(kind, old, fields, needs)
            if changes is not None:
                found[f"{parent}/{spec}"] = changes
        self._judge(name, stage, kind, found)

    def _judge(self, name: str, stage: str, kind: str, found: dict[str, list[str]]) -> None:
        if not found:
            return self._put(name, stage, "other")
        changes = tuple(dict.fromkeys(change for of_one in found.values() for change in of_one))
        old = frozenset(name_ for folder in found for name_ in self._names(name, kind, folder))
        self._put(name, stage, "upgrade", changes, old=old, folders=tuple(found))

    def _changes(
        self, kind: str, old: dict[str, Any], new: dict[str, Any], needs: dict[str, str]
    ) -> list[str] | None:
        """What makes `old` another spec than today's, where versions alone do; None where something else does."""
        remade = {key for key, other in needs.items() if self.parts[other].status == "upgrade"}
        for key in remade:
            values = old.get(key)
            named = values.values() if isinstance(values, dict) else [values]
            if not all(value in self.parts[needs[key]].old for value in named):
                return None  # made from something else
        if any(self.parts[other].status == "other" for other in needs.values()):
            return None
        own = ({key: value for key, value in side.items() if key not in remade} for side in (old, new))
        changes = format_changes(*own)
        if changes is None or not (changes or remade):
            return None
        return [f"{kind} {change}" for change in changes]

    def _names(self, name: str, kind: str, folder: str) -> frozenset[str]:
        """How later stages name what stands in a folder."""
        if kind in ("raw", "captions"):
            return frozenset({folder.rpartition("/")[2]})
        if kind == "towers":
            try:
                return frozenset(read_towers(self.store, folder).digests.values())
            except DataError:
                return frozenset()
        note = recall_stage(self.store, self.recipe.run, name)
        return frozenset({note.digest} if note is not None and note.folder == folder else ())

    def _tower_digests(self) -> dict[str, str]:
        if self.parts["towers"].status == "stands":
            try:
                return read_towers(self.store, specs.towers_folder(self.recipe)).digests
            except DataError:  # damaged: the stage mends it
                self._put("towers", "towers", "other")
        return dict.fromkeys(TOWER_FOLDERS, REMADE)

    def _captions(self) -> None:
        """Without a captioner there is no folder; its fingerprint stands in the text's all the same."""
        recipe, raw = self.recipe, self.parts["ingest"]
        try:
            fields = specs.captions_fields(recipe)
        except DataError:  # the captioner's folder is not on this machine
            return self._put("caption", "caption", "other")
        if recipe.caption.captioner != "none":
            parent = f"datasets/{recipe.data.name}/captions"
            return self._folders("caption", "caption", "captions", parent, fields, {"raw": "ingest"})
        names = raw.old if raw.status == "upgrade" else {fields["raw"]}
        self._put("caption", "caption", raw.status, old=frozenset(fingerprint(fields | {"raw": name}) for name in names))

    def _phase(self, key: str, phase: Training) -> None:
        recipe, store = self.recipe, self.store
        keys = [other for other, _ in recipe.phases()]
        before = keys[keys.index(key) - 1] if key != keys[0] else None
        needs = {"latents": f"latents.{key}", "text": "text"} | ({"init": before} if before else {})
        stage = key.partition(".")[0]
        if any(self.parts[other].status == "other" for other in needs.values()):
            return self._put(key, stage, "other")
        try:
            fields = self._train_fields(key, phase, before, needs)
        except UserError:  # what it starts from is not there, or is behind: the stage will say so
            return self._put(key, stage, "other")
        parent = f"runs/{recipe.run}/checkpoints/{key}"
        today = f"{parent}/{fingerprint(fields)}"
        if all(self.parts[other].status == "stands" for other in needs.values()) and list_checkpoints(store, today):
            return self._put(key, stage, "stands", old=self._names(key, "train", today))
        found = {}
        for spec in store.folders(parent):
            folder = f"{parent}/{spec}"
            old = self._trained_by(key, folder, fields) if folder != today else None
            changes = None if old is None else self._changes("train", old, fields, needs)
            if changes is not None:
                found[folder] = changes
        self._judge(key, stage, "train", found)

    def _train_fields(self, key: str, phase: Training, before: str | None, needs: dict[str, str]) -> dict[str, Any]:
        recipe, store = self.recipe, self.store
        known = {
            name: REMADE if self.parts[other].status == "upgrade" else self._digest(name, phase)
            for name, other in needs.items()
            if name != "init"
        }
        if before and self.parts[before].status == "upgrade":
            return specs.train_fields(recipe, phase, init=REMADE, **known)
        start = upstream.start_of(recipe, store, key) if before or recipe.model.start_from else None
        init = upstream.start_digest(recipe, store, key, start) if start else None
        return specs.train_fields(recipe, phase, init=init, **known)

    def _digest(self, name: str, phase: Training) -> str:
        if name == "text":
            return upstream.text(self.recipe, self.store).digest
        return upstream.latents(self.recipe, self.store, phase).digest

    def _trained_by(self, key: str, folder: str, today: dict[str, Any]) -> dict[str, Any] | None:
        """The fields of a phase's checkpoints: as the run noted them, or as the recipe that lies with them gives them.

        A phase that did not come to its end has no note. The recipe gives the fields by today's rules: where they differ in
        nothing and the fingerprint is another, its format is an older one.
        """
        note = recall_stage(self.store, self.recipe.run, key)
        standing = list_checkpoints(self.store, folder)
        if not standing:
            return None
        if note is not None and note.folder == folder:
            return note.fields
        if key != self.recipe.phases()[0][0]:  # nothing says what a later phase started from
            return None
        try:
            done = read_done(self.store, standing[-1].folder)
            recipe = Recipe.model_validate(done.recipe)
        except (UserError, ValidationError):
            return None
        if recipe.model.start_from != self.recipe.model.start_from:
            return None
        made_from = {name: done.specs[name] for name in ("latents", "text")}
        return specs.train_fields(recipe, recipe.pretrain, init=today["init"], **made_from) | {"format": "older"}

    def _results(self) -> None:
        """Scores and the exported folder follow from the checkpoints. An export alone costs seconds, and asks nothing."""
        run, phases = f"runs/{self.recipe.run}", [self.parts[key] for key, _ in self.recipe.phases()]
        remade = any(phase.status == "upgrade" for phase in phases)
        other = any(phase.status == "other" for phase in phases)
        try:
            protocols = self.store.get_json(f"{run}/evaluations/scores.json")["protocols"].values()
            formats = {protocol["format"] for protocol in protocols}
        except (StoreError, KeyError, AttributeError, TypeError):
            formats = set()
        if other or not formats:
            status, changes = "other", ()
        elif FORMATS["evaluations"] in formats:
            status, changes = ("upgrade" if remade else "stands"), ()
        else:
            status, changes = "upgrade", (f"evaluations format {max(formats)} -> {FORMATS['evaluations']}",)
        folders = (f"{run}/evaluations",) if status == "upgrade" else ()
        self._put("evaluate", "evaluate", status, changes, folders=folders)
        exported = bool(self.store.folders(f"{run}/export"))
        self._put("export", "export", "upgrade" if remade and exported and not other else "stands" if exported else "other")


def look(recipe: Recipe, store: Store) -> list[Part]:
    """Every part of a recipe's run in order. Costs listings of folders and the heads of their manifests, no listing of shards."""
    return _Look(recipe, store).all()


def check_upgrade(recipe: Recipe, store: Store, remake: bool, up_to: str = STAGES[-1], before: str | None = None) -> None:
    """Raises RemakeNeeded where a version makes again what stands, unless `remake` says that it may, now or earlier.

    `up_to`: the last stage that is asked for. `before`: a stage from which on everything is made again by the user's wish.
    """
    stages = STAGES[: STAGES.index(up_to) + 1]
    stages = stages[: stages.index(before)] if before in stages else stages
    parts = [part for part in look(recipe, store) if part.stage in stages]
    changes = {change for part in parts for change in part.changes}
    path = f"runs/{recipe.run}/remake.json"
    allowed = set(_allowed(store, path))
    if changes <= allowed:
        return
    if not remake:
        raise RemakeNeeded(_told(recipe, store, parts))
    store.put_json(path, {"allowed": sorted(allowed | changes)})


def _allowed(store: Store, path: str) -> list[str]:
    try:
        return list(store.get_json(path)["allowed"])
    except (StoreError, KeyError, TypeError):
        return []


def _told(recipe: Recipe, store: Store, parts: list[Part]) -> str:
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
    """For `sd3 plan`: nothing where no format rose, else a row for each part and the line that other commands stop with."""
    try:
        parts = look(recipe, store)
    except StoreError as error:
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
    return {cost.name: cost.hours for cost in stage_costs(recipe)}


def remaking(recipe: Recipe, store: Store, part: Part, estimate: dict[str, float | None]) -> Remaking:
    """By what stands: its bytes, and the seconds that its making took, scaled to all of it; else by the plan's `estimate`."""
    sizes = [_standing(recipe, store, part, folder) for folder in part.folders]
    hours = [size.hours for size in sizes]
    size = sum(size.bytes for size in sizes)
    return Remaking(size, estimate.get(part.name) if None in hours else sum(hours))


def _training_hours(store: Store, last: CheckpointRef) -> float | None:
    """By the middle of the rates that the last checkpoint's rows have."""
    try:
        rows = [json.loads(line) for line in store.get(f"{last.folder}/{METRICS_FILE}").splitlines()]
        rates = [row["samples_per_s"] for row in rows if row.get("samples_per_s")]
    except (StoreError, ValueError, AttributeError):
        return None
    return last.samples / median(rates) / 3600 if rates else None


def _standing(recipe: Recipe, store: Store, part: Part, folder: str) -> Remaking:
    if not store.exists(f"{folder}/{MANIFEST}"):  # checkpoints, scores
        done = list_checkpoints(store, folder)
        return Remaking(sum(entry.size for entry in store.list(folder)), _training_hours(store, done[-1]) if done else None)
    try:
        manifest = read_towers(store, folder) if part.stage == "towers" else read_manifest(store, folder)
    except DataError:
        return Remaking(0, None)
    made_by = read_provenance(store, provenance_path(folder, manifest.digest))
    if made_by is None or not made_by.made or made_by.seconds is None:
        return Remaking(manifest.bytes, None)
    whole = len(manifest.towers if part.stage == "towers" else manifest.shards)
    return Remaking(manifest.bytes, made_by.seconds * whole / made_by.made / 3600)
