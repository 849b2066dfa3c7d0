"""Finds what the stages before left in the store, from the recipe alone.

So any stage can be started on its own.

A stage that is missing, or stands behind the one before it, is a DataError that names the deployment to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from flows.local.home import local_command
from sd3core import specs
from sd3core.captions.api_key import find_api_key, no_api_key
from sd3core.captions.repeated import read_repeated
from sd3core.checkpoint_facts import CheckpointFacts, trained_facts
from sd3core.checkpoint_record import (
    CONFIG_FILE,
    CheckpointDone,
    CheckpointRef,
    list_checkpoints,
    read_checkpoint_done,
)
from sd3core.data.kept_rows import KeptRows
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.phase_images import phase_images, within_epochs
from sd3core.data.size_rule import NO_ENLARGEMENT, TOO_SMALL, SizeRule
from sd3core.data.store import Store, open_store
from sd3core.errors import CheckpointError, DataError, UserError
from sd3core.recipe import Recipe, Training
from sd3core.recipe_compute import ACTOR_STAGES
from sd3core.specs import DONE_FILE, MANIFEST
from sd3core.towers.artifact import TowersManifest, check_vae_channels, check_vae_folder, read_towers
from workers.evaluate import all_scored
from workers.evaluate_tasks import EvaluationInputs, ScoredCheckpoint
from workers.rare_sizes import MIN_SCALE
from workers.ray_room import Node, actors_problem, ranks_problem
from workers.stage import StageNote, recall_stage

Asked = TypeVar("Asked")


class NotFinishedError(DataError):
    """A stage that this recipe needs has not been made to its end."""


class NoRoomError(UserError):
    """Ray has no node that a process of this recipe fits on."""


@dataclass(frozen=True)
class PhaseInputs:
    """What a phase trains on, and what follows from it."""

    latents: ManifestRef
    text: ManifestRef
    start: str | None  # URL of the weights it starts from; None: fresh ones
    fields: dict[str, object]  # what its checkpoints depend on
    training: Training  # the phase, ended where max_epochs ends it


class Upstream:
    """What stands of a recipe's stages, each manifest, note and done record read once, when it is first asked for.

    What was found is kept, what was not is looked for again: a phase that has been trained since is seen. Make a new one
    where something that was asked for may have been made again, as between the stages of a pipeline.
    """

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe, self.store = recipe, store
        self._phases = dict(recipe.phases())
        self._found: dict[tuple[str, str], object] = {}

    @cached_property
    def raw(self) -> ManifestRef:
        return _ref(self._manifest(specs.raw_folder(self.recipe), "ingest", "ingest"))

    @cached_property
    def keep(self) -> ManifestRef | None:
        """None where the recipe names no filter."""
        if self.recipe.filter is None:
            return None
        manifest = self._manifest(specs.keep_folder(self.recipe), "filter", "filter")
        if manifest.inputs["raw"] != self.raw.digest:
            raise DataError(f"filter: what it made is older than raw; {self._made_by('filter')}")
        return _ref(manifest)

    @cached_property
    def kept(self) -> KeptRows:
        return KeptRows.read(self.store, self.keep)

    @cached_property
    def _of_images(self) -> dict[str, str]:
        """What stages are made from after the filter, as their manifests name it."""
        return {"raw": self.raw.digest} | self.kept.inputs

    @cached_property
    def towers_manifest(self) -> TowersManifest:
        folder = specs.towers_folder(self.recipe)
        if not self.store.exists(f"{folder}/{MANIFEST}"):
            raise self._missing("towers")
        return read_towers(self.store, folder)

    @cached_property
    def towers(self) -> ManifestRef:
        return _ref(self.towers_manifest)

    @cached_property
    def captions(self) -> ManifestRef | None:
        """None where the recipe names no captioner."""
        if self.recipe.caption.captioner == "none":
            return None
        manifest = self._manifest(specs.captions_folder(self.recipe), "caption", "caption")
        return self._up_to_date(manifest, "caption", self._of_images)

    @cached_property
    def text(self) -> ManifestRef:
        folder = specs.text_folder(self.recipe, self.towers_manifest.digests)
        manifest = self._manifest(folder, "encode", "text")
        repeated = self._repeated()
        if manifest.inputs.get("repeated", "") != repeated:
            raise DataError(
                f"encode: what it made leaves out other captions than caption.max_share; {self._made_by('encode')}"
            )
        inputs = self._of_images | ({"captions": self.captions.digest} if self.captions else {})
        return self._up_to_date(manifest, "encode", inputs | ({"repeated": repeated} if repeated else {}))

    def _repeated(self) -> str:
        """Names the captions that text leaves out since they stand on too many images; "" for none."""
        if not self.recipe.caption.by_model:
            return ""
        found = read_repeated(self.store, self.captions, self.recipe.caption.max_share)
        if found is None:
            raise self._missing("encode")
        return found.digest

    def latents(self, phase_key: str) -> ManifestRef:
        """Phases of one resolution share them. Those that pretraining needs are encode's, all others are made before their phase."""
        return self._made_latents(phase_key)[0]

    def sizes(self, phase_key: str) -> SizeRule | None:
        """Which images a phase takes; None where its latents leave out none for its size."""
        phase, leaves_out = self._phases[phase_key], self._made_latents(phase_key)[1]
        return SizeRule(tuple(phase.bucket_sides()), phase.min_scale) if leaves_out else None

    def _made_latents(self, phase_key: str) -> tuple[ManifestRef, bool]:
        """A phase's latents, and whether they leave out images for their size."""
        folder = self._latents_folders[phase_key]
        first = next(key for key, other in self._latents_folders.items() if other == folder)
        return self._once("latents", first, lambda: self._latents(folder, first))

    def _latents(self, folder: str, first: str) -> tuple[ManifestRef, bool]:
        stage = "encode" if first == next(iter(self._phases)) else first.partition(".")[0]
        manifest = self._manifest(folder, stage, specs.latents_part(first))
        leaves_out = any(TOO_SMALL in shard.failed for shard in manifest.shards)
        self._check_min_scale(first, stage, manifest, leaves_out)
        # with flips, the captions say of which images
        captions = {"captions": self.captions.digest} if self.recipe.encode.flip and self.captions else {}
        return self._up_to_date(manifest, stage, self._of_images | captions), leaves_out

    def _check_min_scale(self, first: str, stage: str, manifest: Manifest, leaves_out: bool) -> None:
        """DataError where the run made these latents with a min_scale by which they may be of other images than today's."""
        note, wanted = self._note(specs.latents_part(first)), self._phases[first].min_scale
        if note is None or (note.folder, note.digest) != (manifest.folder, manifest.digest):
            return
        # from before there was one they take all, and stay where a recipe does not name it
        made_with = note.fields.get(MIN_SCALE, wanted if wanted == NO_ENLARGEMENT else 0)
        if made_with != wanted and (leaves_out or wanted > made_with):
            raise DataError(
                f"{stage}: what it made is by {first}.min_scale {made_with:g}, not {wanted:g}; {self._made_by(stage)}"
            )

    @cached_property
    def _latents_folders(self) -> dict[str, str]:
        digests = self.towers_manifest.digests
        return {key: specs.latents_folder(self.recipe, phase, digests) for key, phase in self._phases.items()}

    def phase_inputs(self, phase_key: str) -> PhaseInputs:
        """Finding them needs the phase before to be finished."""
        return self._once("inputs", phase_key, lambda: self._phase_inputs(phase_key))

    def _phase_inputs(self, phase_key: str) -> PhaseInputs:
        latents, text, start = self.latents(phase_key), self.text, self.start_of(phase_key)
        phase = self._phases[phase_key]
        training = within_epochs(phase, self.images(phase_key)) if phase.max_epochs is not None else phase
        fields = specs.train_fields(
            self.recipe,
            phase,
            latents=latents.digest,
            text=text.digest,
            init=self.start_digest(phase_key) if start else None,
            samples=training.samples,
        )
        return PhaseInputs(latents, text, start, fields, training)

    def images(self, phase_key: str) -> int:
        """How many images a phase trains on."""
        return self._once("images", phase_key, lambda: self._images(phase_key))

    def _images(self, phase_key: str) -> int:
        return phase_images(self.store, self.latents(phase_key), self.text, self._phases[phase_key].global_batch)

    def start_of(self, phase_key: str) -> str | None:
        """URL of what a phase starts from: the last checkpoint of the phase before; for the first one model.start_from."""
        if before := self._before(phase_key):
            return self.store.uri(self.last_checkpoint(before).folder)
        return open_store(self.recipe.model.start_from).url if self.recipe.model.start_from else None

    def start_digest(self, phase_key: str) -> str:
        """Names the content of what a phase starts from, for one that does not start from fresh weights."""
        if before := self._before(phase_key):
            return self.last_digest(before)
        from sd3core.checkpoint import open_checkpoint  # loads torch, which a start from fresh weights does not need

        start = self.start_of(phase_key)
        return self._once(
            "start", phase_key, lambda: self._noted_start(phase_key, start) or open_checkpoint(start).digest
        )

    def checkpoints(self, phase_key: str) -> list[CheckpointRef]:
        """The finished checkpoints of a phase that has been trained to its end, oldest first."""
        return self._once("checkpoints", phase_key, lambda: self._checkpoints(phase_key))

    def _checkpoints(self, phase_key: str) -> list[CheckpointRef]:
        inputs = self.phase_inputs(phase_key)
        folder = specs.checkpoints_folder(self.recipe, phase_key, inputs.fields)
        end = inputs.training.last_samples
        found = list_checkpoints(self.store, folder, end)  # a longer run's stand there too
        if not found or found[-1].samples < end:
            raise self._missing(phase_key.partition(".")[0])
        return found

    def last_checkpoint(self, phase_key: str) -> CheckpointRef:
        return self.checkpoints(phase_key)[-1]

    def last_digest(self, phase_key: str) -> str:
        """The digest that names the content of a phase's last checkpoint."""
        return self.digest_of(self.last_checkpoint(phase_key))

    def facts_of(self, checkpoint: CheckpointRef) -> CheckpointFacts:
        """What a checkpoint says of itself."""
        return trained_facts(self._done(checkpoint.folder), self.store.uri(checkpoint.folder))

    def digest_of(self, checkpoint: CheckpointRef) -> str:
        """The digest that names a checkpoint's content."""
        return self._once("digest", checkpoint.folder, lambda: self._done(checkpoint.folder).digest)

    def _done(self, folder: str) -> CheckpointDone:
        return self._once("done", folder, lambda: read_checkpoint_done(self.store, folder))

    def to_be_scored(self) -> EvaluationInputs:
        """What evaluation goes by."""
        trained = {
            key: [ScoredCheckpoint(ref.folder, ref.samples, self.digest_of(ref)) for ref in self.checkpoints(key)]
            for key in self._phases
        }
        return EvaluationInputs(
            checkpoints=trained,
            raw=self.raw,
            text=self.text,
            latents={key: self.latents(key) for key in self._phases},
            towers=self.towers.folder,
            tower_digests=self.towers_manifest.digests,
            keep=self.keep,
            kept=self.kept.inputs,
            sizes={key: sizes for key in self._phases if (sizes := self.sizes(key))},
        )

    def check_start_from(self) -> None:
        """Says of `model.start_from`, before the hours of earlier stages, what pretraining would say after them."""
        key, phase = self.recipe.phases()[0]
        start = self.start_of(key)
        if start and self._noted_start(key, start) is None:
            from workers.trainer.start import check_start  # loads torch

            check_start(key, start, self.recipe.model_config_for(phase), phase.formulation)

    def check_vae(self) -> None:
        """Raises DataError where the VAE's latents have other channels than the model: the released one's, where its folder
        is here, and the one that stands in the store.
        """
        channels = self.recipe.model_config_for(self.recipe.phases()[0][1]).latent_channels
        if self.recipe.towers.released is not None:
            check_vae_folder(self.recipe.towers.released.vae, channels)
        path = f"{specs.towers_folder(self.recipe)}/vae/config.json"
        if self.store.exists(path):
            check_vae_channels(self.store.get(path), channels, self.store.uri(path))

    def check_captioner(self) -> None:
        """Says of the captioner, before the hours of earlier stages, what it would say after them: a package that its model needs, a
        key that is not there. Captions that stand need neither.
        """
        caption = self.recipe.caption
        if not caption.by_model or self._has_nothing_to_do("caption"):
            return
        if caption.captioner == "vision_language_model":
            from sd3core.captions.vision_language import load_processor  # loads transformers

            load_processor(Path(caption.model))
        # on a cluster its nodes may have the key
        elif caption.api_key_env and self.recipe.compute.ray_address is None and not find_api_key(caption.api_key_env):
            raise no_api_key(caption.api_key_env)

    def check_room(self, living_nodes: Callable[[], Sequence[Node]]) -> None:
        """Says before the first stage what a later one would say of compute's CPUs and GPUs. A stage for which all stands as today's
        recipe makes it has nothing to do, and needs none; where that is so of all, no nodes are asked for.
        """
        compute = self.recipe.compute
        problems = {stage: partial(actors_problem, compute.for_stage(stage)) for stage in ACTOR_STAGES}
        problems["training"] = partial(ranks_problem, compute)
        if all(map(self._has_nothing_to_do, problems)):
            return
        nodes = living_nodes()
        for stage, problem_on in problems.items():
            if (problem := problem_on(nodes)) and not self._has_nothing_to_do(stage):
                raise NoRoomError(problem)

    def _has_nothing_to_do(self, stage: str) -> bool:
        try:
            return self._stands(stage)
        except (DataError, CheckpointError):  # it has not ended, or one before it has not, or is behind, or damaged
            return False

    def _stands(self, stage: str) -> bool:
        if stage == "filter":
            return self.recipe.filter is None or self.keep is not None
        if stage == "caption":
            return self.recipe.caption.captioner == "none" or self.captions is not None
        if stage == "encode":
            return all([self.text, *(self.latents(key) for key in self._phases)])
        if stage == "training":
            return bool(self.checkpoints(self.recipe.phases()[-1][0]))
        if stage == "evaluate":
            return all_scored(self.recipe, self.store, self.to_be_scored())
        return bool(self.raw if stage == "ingest" else self.towers)

    def _before(self, phase_key: str) -> str | None:
        keys = list(self._phases)
        return keys[keys.index(phase_key) - 1] if phase_key != keys[0] else None

    def _noted_start(self, phase_key: str, start: str) -> str | None:
        """The digest of a start that is gone, as the phase noted it when it ended: what is trained does not need it again."""
        folder = open_store(start)
        note = recall_stage(self.store, self.recipe.run, phase_key)
        if note is None or folder.exists(DONE_FILE) or folder.exists(CONFIG_FILE):
            return None
        trained = list_checkpoints(self.store, note.folder)
        of_recipe = read_checkpoint_done(self.store, trained[-1].folder).recipe if trained else None
        same = of_recipe is not None and of_recipe["model"].get("start_from") == self.recipe.model.start_from
        return note.fields["init"] if same else None

    def _manifest(self, folder: str, stage: str, note: str) -> Manifest:
        """The manifest that this run last used (its stage note `note` says which), else the folder's newest.

        Runs whose data differ only in the number of images share a folder, so the newest may be another run's.
        """
        if not self.store.exists(f"{folder}/{MANIFEST}"):
            raise self._missing(stage)
        used = self._note(note)
        if used is not None and used.folder == folder:
            with suppress(DataError):  # its copy is gone, and the newest is another one
                return read_manifest(self.store, folder, used.digest)
        return read_manifest(self.store, folder)

    def _note(self, name: str) -> StageNote | None:
        return self._once("note", name, lambda: recall_stage(self.store, self.recipe.run, name))

    def _up_to_date(self, manifest: Manifest, stage: str, wanted: dict[str, str]) -> ManifestRef:
        """`wanted`: its inputs. DataError where it was made from others."""
        names = [*wanted, *(name for name in manifest.inputs if name not in wanted)]
        behind = [name for name in names if manifest.inputs.get(name) != wanted.get(name)]
        if behind:
            raise DataError(f"{stage}: what it made is older than {behind[0]}; {self._made_by(stage)}")
        return _ref(manifest)

    def _once(self, kind: str, key: str, find: Callable[[], Asked]) -> Asked:
        if (kind, key) not in self._found:
            self._found[kind, key] = find()
        return self._found[kind, key]

    def _missing(self, stage: str) -> NotFinishedError:
        return NotFinishedError(f"{stage} is not finished for this recipe and its settings; {self._made_by(stage)}")

    def _made_by(self, stage: str) -> str:
        return (
            f"`{local_command(f'sd3 demo --recipe {self.recipe.name}')}` with the same --set makes all that is missing,"
            f" the deployment '{stage}/{self.recipe.name}' this alone"
        )


def _ref(manifest: Manifest | TowersManifest) -> ManifestRef:
    return ManifestRef(manifest.folder, manifest.digest)
