"""Says what stands of a recipe's run, part by part.

A part stands as this version makes it, or as an earlier one did.

It is read from listings of folders, stage notes and the heads of manifests: a question costs some 40 requests and less than a MB,
also of a data set of 100,000 shards. Of another version is what differs in the numbers that only this software changes, in its own fields or in those of
what it was made from.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from flows.upstream import Upstream
from sd3core import specs
from sd3core.checkpoint_record import CheckpointRef, list_checkpoints, read_checkpoint_done
from sd3core.data.manifest import ManifestRef, read_head, read_manifest
from sd3core.data.phase_images import phase_images, within_epochs
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError, UserError
from sd3core.format_changes import format_changes
from sd3core.recipe import Recipe, Training
from sd3core.specs import FORMATS, MANIFEST, STAGES, fingerprint
from sd3core.towers.artifact import TOWER_FOLDERS, read_towers
from workers.stage import StageNote, recall_stage

REMADE = "remade"  # in place of a digest that is known when what is upstream is made again


@dataclass(frozen=True)
class StandingPart:
    """A stage, or one of the things that it makes, as far as it stands."""

    name: str  # as in stage notes: "ingest", "latents.pretrain", "finetune.0"
    stage: str  # that it is taken back with (flows.redo): all latents are encode's
    status: Literal["stands", "upgrade", "other"]  # other: never made, or made again for another reason
    changes: tuple[str, ...] = ()  # "train format 1 -> 2"; none where only what is upstream is made again
    folders: tuple[str, ...] = ()  # of what stands and would be made again


def standing_parts(recipe: Recipe, store: Store, up_to: str = STAGES[-1]) -> list[StandingPart]:
    """Every part of a recipe's run in order, as far as the stage `up_to`."""
    return _Look(recipe, store).all(up_to)


@dataclass(frozen=True)
class _Spec:
    """What a part is made by today. The folders beside its own are of other settings, or of other versions."""

    kind: str
    parent: str
    fields: dict[str, Any]
    needs: dict[str, str]  # field -> the part that it names

    @property
    def folder(self) -> str:
        return f"{self.parent}/{fingerprint(self.fields)}"


OLDER = "older"  # in place of a format's number that nothing says


class _Look:
    """Goes through the stages in their order; each part is judged by what is known of those before it."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe, self.store = recipe, store
        self.parts: dict[str, StandingPart] = {}
        self.today: dict[str, _Spec] = {}
        self.tower_digests = dict.fromkeys(TOWER_FOLDERS, REMADE)
        self.checkpoints: dict[str, list[CheckpointRef]] = {}  # of phases that stand
        self.ends: dict[str, int] = {}  # samples at a phase's end, where max_epochs may have moved it
        self.older: dict[str, dict[str, tuple[str, ...]]] = {}
        self.notes: dict[str, StageNote | None] = {}
        self.read: dict[str, str] = {}

    def all(self, up_to: str) -> list[StandingPart]:
        steps = {
            "ingest": self._ingest,
            "towers": self._towers,
            "filter": self._filter,
            "caption": self._caption,
            "encode": self._encode,
            "pretrain": lambda: self._phase(*self.recipe.phases()[0]),
            "finetune": self._finetune,
            "evaluate": self._evaluate,
            "export": self._export,
        }
        for stage in STAGES[: STAGES.index(up_to) + 1]:
            steps[stage]()
        hidden = {"caption"} if self.recipe.caption.captioner == "none" else set()  # there is nothing to be made
        return [part for name, part in self.parts.items() if name not in hidden]

    def _ingest(self) -> None:
        self._data(
            "ingest",
            "ingest",
            "raw",
            specs.data_folder(self.recipe.data.name, "raw"),
            specs.raw_fields(self.recipe),
            {},
        )

    def _towers(self) -> None:
        recipe = self.recipe
        needs = {"raw": "ingest"} if recipe.towers.small is not None else {}
        self._data(
            "towers", "towers", "towers", specs.named_towers(recipe.towers.name), specs.towers_fields(recipe), needs
        )
        if self.parts["towers"].status == "stands":
            try:
                self.tower_digests = read_towers(self.store, self.today["towers"].folder).digests
            except DataError:  # damaged: the stage mends it
                self._put("towers", "towers", "other")

    def _filter(self) -> None:
        """Adds what a filter measured and what it keeps. Later parts have neither in their specs."""
        recipe, name, needs = self.recipe, self.recipe.data.name, {"raw": "ingest"}
        if recipe.filter is None:
            return
        try:
            keep = specs.keep_fields(recipe)
            if recipe.filter.measures:
                parent = specs.data_folder(name, "measures")
                self._data("measures", "filter", "measures", parent, specs.measures_fields(recipe), needs)
                needs = needs | {"measures": "measures"}
        except DataError:  # a model's folder is not on this machine
            return self._put("filter", "filter", "other")
        self._data("filter", "filter", "keep", specs.data_folder(name, "keep"), keep, needs)

    def _caption(self) -> None:
        """Adds the captions. A recipe without a captioner has no folder, yet its fingerprint stands in the text's."""
        recipe = self.recipe
        try:
            fields = specs.captions_fields(recipe)
        except DataError:  # the captioner's folder is not on this machine
            return self._put("caption", "caption", "other")
        parent = specs.data_folder(recipe.data.name, "captions")
        if recipe.caption.captioner != "none":
            return self._data("caption", "caption", "captions", parent, fields, {"raw": "ingest"})
        self.today["caption"] = _Spec("captions", parent, fields, {})
        self._put("caption", "caption", "other" if self.parts["ingest"].status == "other" else "stands")

    def _without_captioner(self) -> dict[str, tuple[str, ...]]:
        """The fingerprints that stood for no captions before, as folders, and the changes since."""
        spec, today, found = self.today["caption"], FORMATS["captions"], {}
        raws = {folder.rpartition("/")[2]: changes for folder, changes in self._older("ingest").items()}
        for raw, changes in ({spec.fields["raw"]: ()} | raws).items():
            for number in range(1, today + 1):
                folder = f"{spec.parent}/{fingerprint(spec.fields | {'raw': raw, 'format': number})}"
                found[folder] = changes + ((f"captions format {number} -> {today}",) if number < today else ())
        return found

    def _encode(self) -> None:
        recipe, name = self.recipe, self.recipe.data.name
        try:
            text = specs.text_fields(recipe, self.tower_digests)
        except DataError:  # as for the captions, whose fingerprint stands in it
            self._put("text", "encode", "other")
        else:
            self._data(
                "text",
                "encode",
                "text",
                specs.data_folder(name, "text"),
                text,
                {"encoders": "towers", "captions": "caption"},
            )
        self._latents(*recipe.phases()[0])

    def _latents(self, key: str, phase: Training) -> None:
        parent, needs = specs.data_folder(self.recipe.data.name, "latents"), {"vae": "towers", "raw": "ingest"}
        if self.recipe.encode.flip:
            needs["captions"] = "caption"
        try:
            fields = specs.latents_fields(self.recipe, phase, self.tower_digests)
        except DataError:  # with flips the captioner's folder says what is flipped, and it is not on this machine
            return self._put(specs.latents_part(key), "encode", "other")
        self._data(specs.latents_part(key), "encode", "latents", parent, fields, needs)

    def _data(
        self, name: str, stage: str, kind: str, parent: str, fields: dict[str, Any], needs: dict[str, str]
    ) -> None:
        """A part whose specs are folders side by side, whoever made them."""
        spec = self.today[name] = _Spec(kind, parent, fields, needs)
        if self._ready(spec) and self.store.exists(f"{spec.folder}/{MANIFEST}"):
            self._put(name, stage, "stands")
        else:
            self._judge(name, stage)

    def _finetune(self) -> None:
        for key, phase in self.recipe.phases()[1:]:
            self._latents(key, phase)
            self._phase(key, phase)

    def _phase(self, key: str, phase: Training) -> None:
        keys = [other for other, _ in self.recipe.phases()]
        before = keys[keys.index(key) - 1] if key != keys[0] else None
        needs = {"latents": specs.latents_part(key), "text": "text"} | ({"init": before} if before else {})
        stage, parent = key.partition(".")[0], specs.phase_folder(self.recipe.run, key)
        if any(self.parts[other].status == "other" for other in needs.values()) or not self.store.folders(parent):
            return self._put(key, stage, "other")
        try:
            fields = self._train_fields(key, phase, before)
        except UserError:  # what it starts from is not there, or is behind: the stage will say so
            return self._put(key, stage, "other")
        spec = self.today[key] = _Spec("train", parent, fields, needs)
        self.checkpoints[key] = list_checkpoints(self.store, spec.folder)
        if self._ready(spec) and self.checkpoints[key]:
            self._put(key, stage, "stands")
        else:
            self._judge(key, stage)

    def _train_fields(self, key: str, phase: Training, before: str | None) -> dict[str, Any]:
        recipe, init = self.recipe, None
        if before:
            init = REMADE if self.parts[before].status == "upgrade" else self._end_of(before)
        elif recipe.model.start_from:
            init = Upstream(recipe, self.store).start_digest(key)
        parts = {"latents": specs.latents_part(key), "text": "text"}
        data = {
            name: REMADE if self.parts[part].status == "upgrade" else self._digest(part) for name, part in parts.items()
        }
        ended = phase
        if phase.max_epochs is not None and all(
            refs := [self._counted(part, data[name]) for name, part in parts.items()]
        ):
            ended = within_epochs(phase, phase_images(self.store, *refs, phase.global_batch))
        self.ends[key] = ended.last_samples
        return specs.train_fields(recipe, phase, init=init, samples=ended.samples, **data)

    def _counted(self, part: str, digest: str) -> ManifestRef | None:
        """The data by which a phase counts its epochs: of what a version makes again, that which the run has used, of as many rows."""
        if digest != REMADE:
            return ManifestRef(self.today[part].folder, digest)
        note = self._note(part)
        return ManifestRef(note.folder, note.digest) if note is not None else None

    def _end_of(self, key: str) -> str:
        """The digest of a phase's last checkpoint. DataError where it is not trained to its end."""
        end = self.ends[key]
        last = next((checkpoint for checkpoint in self.checkpoints[key] if checkpoint.samples == end), None)
        if last is None:
            raise DataError(f"{key} is not trained to its end")
        return read_checkpoint_done(self.store, last.folder).digest

    def _digest(self, name: str) -> str:
        """Digest of the manifest that this run reads of a part: the one that it noted, else the newest, as in flows.upstream.

        DataError where what it was made from is not what the run reads of that.
        """
        folder = self.today[name].folder
        # of phases that share latents
        first = next(other for other, spec in self.today.items() if spec.folder == folder)
        if first in self.read:
            return self.read[first]
        note = self._note(first)
        digest = note.digest if note is not None and note.folder == folder else None
        head = read_head(self.store, ManifestRef(folder, digest).path) if digest else None
        if head is None:
            head = read_manifest(self.store, folder)  # whole: only its bytes say its digest
            digest = head.digest
        for key, part in (("raw", "ingest"), ("captions", "caption")):
            if key in head.inputs and head.inputs[key] != self._digest(part):
                raise DataError(f"{name}: what it made is older than {key}")
        self.read[first] = digest
        return digest

    def _evaluate(self) -> None:
        """Scores follow from the checkpoints."""
        folder = specs.evaluations_folder(self.recipe.run)
        statuses = {self.parts[key].status for key, _ in self.recipe.phases()}
        try:
            protocols = self.store.get_json(specs.scores_path(self.recipe.run))["protocols"].values()
            formats = {protocol["format"] for protocol in protocols}
        except (StoreError, KeyError, AttributeError, TypeError):
            formats = set()
        if "other" in statuses or not formats:
            self._put("evaluate", "evaluate", "other")
        elif FORMATS["evaluations"] not in formats:
            change = f"evaluations format {max(formats)} -> {FORMATS['evaluations']}"
            self._put("evaluate", "evaluate", "upgrade", (change,), (folder,))
        elif "upgrade" in statuses:
            self._put("evaluate", "evaluate", "upgrade", folders=(folder,))
        else:
            self._put("evaluate", "evaluate", "stands")

    def _export(self) -> None:
        """An export follows from the last checkpoint. Alone it costs seconds, and asks nothing."""
        statuses = {self.parts[key].status for key, _ in self.recipe.phases()}
        exported = bool(self.store.folders(specs.exports_folder(self.recipe.run)))
        remade = "upgrade" in statuses and "other" not in statuses
        self._put("export", "export", "other" if not exported else "upgrade" if remade else "stands")

    def _put(
        self, name: str, stage: str, status: Any, changes: tuple[str, ...] = (), folders: tuple[str, ...] = ()
    ) -> None:
        self.parts[name] = StandingPart(name, stage, status, changes, folders)

    def _ready(self, spec: _Spec) -> bool:
        return all(self.parts[other].status == "stands" for other in spec.needs.values())

    def _judge(self, name: str, stage: str) -> None:
        """Says of a part that does not stand as today whether it does as a version before made it."""
        older = self._older(name)
        changes = tuple(dict.fromkeys(change for of_one in older.values() for change in of_one))
        self._put(name, stage, "upgrade" if older else "other", changes, tuple(older))

    def _older(self, name: str) -> dict[str, tuple[str, ...]]:
        """The folders of a part that versions alone set apart from today's, each with the changes that lead to today's."""
        if name == "caption" and self.recipe.caption.captioner == "none":
            return self._without_captioner()
        if name not in self.older:
            spec, found = self.today[name], {}
            if all(self.parts[other].status != "other" for other in spec.needs.values()):
                for folder in (f"{spec.parent}/{other}" for other in self.store.folders(spec.parent)):
                    fields = self._fields_of(name, folder) if folder != spec.folder else None
                    changes = None if fields is None else self._changes(spec, fields)
                    if changes is not None:
                        found[folder] = changes
            self.older[name] = found
        return self.older[name]

    def _changes(self, spec: _Spec, old: dict[str, Any]) -> tuple[str, ...] | None:
        """From `old` to today's fields where versions alone made them, or what they name, another; None where more did.

        The changes of what is upstream are named where that stands as today's already: nothing else tells of them.
        """
        told, remade = [], False
        for key, other in spec.needs.items():
            for value in _values(old.get(key)):
                if value not in _values(spec.fields[key]):
                    changes = self._led_here(other, value)
                    if changes is None:
                        return None
                    remade = True
                    told += changes if self.parts[other].status == "stands" else ()
        own = format_changes(
            *({key: side[key] for key in side if key not in spec.needs} for side in (old, spec.fields))
        )
        if own is None or not (own or remade):
            return None
        return tuple(dict.fromkeys([*told, *(f"{spec.kind} {change}" for change in own)]))

    def _led_here(self, name: str, value: Any) -> tuple[str, ...] | None:
        """The changes since the version whose result of a part `value` names; None where it names none of them."""
        return next(
            (changes for folder, changes in self._older(name).items() if self._is_of(name, folder, value)), None
        )

    def _is_of(self, name: str, folder: str, value: Any) -> bool:
        """Whether `value`, a fingerprint or a digest, is how later stages name what stands in a part's folder."""
        kind = self.today[name].kind
        if not isinstance(value, str):
            return False
        if kind in ("raw", "measures", "captions"):
            return value == folder.rpartition("/")[2]
        if kind in ("text", "latents"):
            return self.store.exists(ManifestRef(folder, value).path)
        with suppress(UserError):
            if kind == "towers":
                return value in read_towers(self.store, folder).digests.values()
            note = self._note(name)
            if note is not None and (note.folder, note.digest) == (folder, value):
                return True
            checkpoints = list_checkpoints(self.store, folder)
            return any(
                read_checkpoint_done(self.store, checkpoint.folder).digest == value for checkpoint in checkpoints
            )
        return False

    def _fields_of(self, name: str, folder: str) -> dict[str, Any] | None:
        if self.today[name].kind == "train":
            return self._trained_by(name, folder)
        head = read_head(self.store, f"{folder}/{MANIFEST}")
        return None if head is None else head.fields

    def _trained_by(self, key: str, folder: str) -> dict[str, Any] | None:
        """The fields of a phase's checkpoints: as the run noted them, or as the recipe that lies with them gives them.

        A phase that did not come to its end has no note. The recipe gives the fields by today's rules: where they differ in
        nothing and the fingerprint is another, its format is an older one.
        """
        note = self._note(key)
        standing = list_checkpoints(self.store, folder)
        if not standing:
            return None
        if note is not None and note.folder == folder:
            return note.fields
        if key != self.recipe.phases()[0][0]:  # nothing says what a later phase started from
            return None
        try:
            done = read_checkpoint_done(self.store, standing[-1].folder)
            recipe = Recipe.model_validate(done.recipe)
        except (UserError, ValidationError):
            return None
        if recipe.model.start_from != self.recipe.model.start_from:
            return None
        made_from = {name: done.specs[name] for name in ("latents", "text")}
        init = self.today[key].fields["init"]
        return specs.train_fields(recipe, recipe.pretrain, init=init, **made_from) | {"format": OLDER}

    def _note(self, name: str) -> StageNote | None:
        if name not in self.notes:
            self.notes[name] = recall_stage(self.store, self.recipe.run, name)
        return self.notes[name]


def _values(named: Any) -> list[Any]:
    return list(named.values()) if isinstance(named, dict) else [named]
