"""Finds what the stages before left in the store, from the recipe alone.

Any stage can so be started on its own. A stage that is missing, or stands behind the one before it, is a DataError that names the deployment to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flows.local.home import local_command
from sd3core import specs
from sd3core.checkpoint import (
    CONFIG_FILE,
    DONE_FILE,
    CheckpointRef,
    checkpoint_digest,
    list_checkpoints,
    read_checkpoint_done,
)
from sd3core.data.manifest import MANIFEST, Manifest, ManifestRef, manifest_ref, read_manifest
from sd3core.data.store import Store, open_store
from sd3core.errors import CheckpointError, DataError, UserError
from sd3core.recipe import Recipe, Training
from sd3core.towers.artifact import TowersManifest, check_vae_channels, check_vae_folder, read_towers
from workers.evaluate import all_scored
from workers.evaluate_tasks import EvaluationInputs
from workers.ray_room import Node, actors_problem, ranks_problem
from workers.stage import recall_stage
from workers.trainer.start import check_start


class NotFinishedError(DataError):
    """A stage that this recipe needs has not been made to its end."""


class NoRoomError(UserError):
    """Ray has no node that a process of this recipe fits on."""


def raw(recipe: Recipe, store: Store) -> ManifestRef:
    return _ref(_manifest(recipe, store, specs.raw_folder(recipe), "ingest", "ingest"))


def towers_manifest(recipe: Recipe, store: Store) -> TowersManifest:
    folder = specs.towers_folder(recipe)
    if not store.exists(f"{folder}/{MANIFEST}"):
        raise _missing(recipe, "towers")
    return read_towers(store, folder)


def towers_ref(recipe: Recipe, store: Store) -> ManifestRef:
    manifest = towers_manifest(recipe, store)
    return manifest_ref(manifest.folder, manifest.digest)


def captions(recipe: Recipe, store: Store) -> ManifestRef | None:
    """None where the recipe names no captioner."""
    if recipe.caption.captioner == "none":
        return None
    manifest = _manifest(recipe, store, specs.captions_folder(recipe), "caption", "caption")
    return _ref(_up_to_date(recipe, manifest, "caption", raw=raw(recipe, store)))


def text(recipe: Recipe, store: Store) -> ManifestRef:
    folder = specs.text_folder(recipe, towers_manifest(recipe, store).digests)
    manifest = _manifest(recipe, store, folder, "encode", "text")
    return _ref(_up_to_date(recipe, manifest, "encode", raw=raw(recipe, store), captions=captions(recipe, store)))


def latents(recipe: Recipe, store: Store, phase: Training) -> ManifestRef:
    digests = towers_manifest(recipe, store).digests
    folder = specs.latents_folder(recipe, phase, digests)
    key = next(key for key, other in recipe.phases() if specs.latents_folder(recipe, other, digests) == folder)
    manifest = _manifest(recipe, store, folder, "encode", f"latents.{key}")
    return _ref(_up_to_date(recipe, manifest, "encode", raw=raw(recipe, store)))


@dataclass(frozen=True)
class PhaseInputs:
    """What a phase trains on, and what follows from it."""

    latents: ManifestRef
    text: ManifestRef
    start: str | None  # URL of the weights it starts from; None: fresh ones
    fields: dict[str, object]  # what its checkpoints depend on


def phase_inputs(recipe: Recipe, store: Store, phase_key: str) -> PhaseInputs:
    """Finding them needs the phase before to be finished."""
    phase = dict(recipe.phases())[phase_key]
    its_latents, its_text, start = (
        latents(recipe, store, phase),
        text(recipe, store),
        start_of(recipe, store, phase_key),
    )
    fields = specs.train_fields(
        recipe,
        phase,
        latents=its_latents.digest,
        text=its_text.digest,
        init=start_digest(recipe, store, phase_key, start) if start else None,
    )
    return PhaseInputs(its_latents, its_text, start, fields)


def check_start_from(recipe: Recipe, store: Store) -> None:
    """Says of `model.start_from`, before the hours of earlier stages, what pretraining would say after them."""
    key, phase = recipe.phases()[0]
    start = start_of(recipe, store, key)
    if start and _noted_start(recipe, store, key, start) is None:
        check_start(key, start, recipe.model_config_for(phase), phase.formulation)


def check_vae(recipe: Recipe, store: Store) -> None:
    """Raises DataError where the VAE's latents have other channels than the model: the released one's, where its folder is
    here, and the one that stands in the store.
    """
    channels = recipe.model_config_for(recipe.phases()[0][1]).latent_channels
    if recipe.towers.released is not None:
        check_vae_folder(recipe.towers.released.vae, channels)
    folder = specs.towers_folder(recipe)
    if store.exists(f"{folder}/vae/config.json"):
        path = f"{folder}/vae/config.json"
        check_vae_channels(store.get(path), channels, store.uri(path))


def check_room(recipe: Recipe, store: Store, nodes: Sequence[Node]) -> None:
    """Says before the first stage what a later one would say of compute's CPUs and GPUs. A stage for which all stands as today's recipe
    makes it has nothing to do, and needs none.
    """
    last, _ = recipe.phases()[-1]
    scored = lambda: all_scored(recipe, store, *to_be_scored(recipe, store))
    if (problem := actors_problem(recipe.compute, nodes)) and not _stands(scored):
        raise NoRoomError(problem)
    if (problem := ranks_problem(recipe.compute, nodes)) and not _stands(lambda: checkpoints(recipe, store, last)):
        raise NoRoomError(problem)


def _stands(found: Callable[[], object]) -> bool:
    try:
        return bool(found())
    except (DataError, CheckpointError):  # a stage before it is not finished, behind, or damaged
        return False


def to_be_scored(recipe: Recipe, store: Store) -> tuple[dict[str, list[str]], EvaluationInputs]:
    """What evaluation goes by: the checkpoints of every phase, oldest first, and the data."""
    phases = recipe.phases()
    trained = {key: [checkpoint.folder for checkpoint in checkpoints(recipe, store, key)] for key, _ in phases}
    inputs = EvaluationInputs(
        raw=raw(recipe, store),
        text=text(recipe, store),
        latents={key: latents(recipe, store, phase) for key, phase in phases},
        towers=towers_ref(recipe, store).folder,
    )
    return trained, inputs


def start_digest(recipe: Recipe, store: Store, phase_key: str, start: str) -> str:
    """Names the content of what a phase starts from."""
    return _noted_start(recipe, store, phase_key, start) or checkpoint_digest(start)


def _noted_start(recipe: Recipe, store: Store, phase_key: str, start: str) -> str | None:
    """The digest of a start that is gone, as the phase noted it when it ended: what is trained does not need it again."""
    folder = open_store(start)
    note = recall_stage(store, recipe.run, phase_key)
    if note is None or folder.exists(DONE_FILE) or folder.exists(CONFIG_FILE):
        return None
    trained = list_checkpoints(store, note.folder)
    of_recipe = read_checkpoint_done(store, trained[-1].folder).recipe if trained else None
    same = of_recipe is not None and of_recipe["model"].get("start_from") == recipe.model.start_from
    return note.fields["init"] if same else None


def start_of(recipe: Recipe, store: Store, phase_key: str) -> str | None:
    """URL of what a phase starts from: the last checkpoint of the phase before; for the first one model.start_from."""
    keys = [key for key, _ in recipe.phases()]
    position = keys.index(phase_key)
    if position:
        return store.uri(last_checkpoint_of_phase(recipe, store, keys[position - 1]).folder)
    return open_store(recipe.model.start_from).url if recipe.model.start_from else None


def checkpoints(recipe: Recipe, store: Store, phase_key: str) -> list[CheckpointRef]:
    """The finished checkpoints of a phase that has been trained to its end, oldest first."""
    folder = specs.checkpoints_folder(recipe, phase_key, phase_inputs(recipe, store, phase_key).fields)
    end = dict(recipe.phases())[phase_key].last_samples
    found = list_checkpoints(store, folder, end)  # a longer run's stand there too
    if not found or found[-1].samples < end:
        raise _missing(recipe, phase_key.partition(".")[0])
    return found


def last_checkpoint_of_phase(recipe: Recipe, store: Store, phase_key: str) -> CheckpointRef:
    return checkpoints(recipe, store, phase_key)[-1]


def _manifest(recipe: Recipe, store: Store, folder: str, stage: str, note: str) -> Manifest:
    """The manifest that this run last used (its stage note `note` says which), else the folder's newest.

    Runs whose data differ only in the number of images share a folder, so the newest may be another run's.
    """
    if not store.exists(f"{folder}/{MANIFEST}"):
        raise _missing(recipe, stage)
    used = recall_stage(store, recipe.run, note)
    if used is not None and used.folder == folder:
        with suppress(DataError):  # its copy is gone, and the newest is another one
            return read_manifest(store, folder, used.digest)
    return read_manifest(store, folder)


def _up_to_date(recipe: Recipe, manifest: Manifest, stage: str, **inputs: ManifestRef | None) -> Manifest:
    wanted = {name: ref.digest for name, ref in inputs.items() if ref is not None}
    behind = [name for name, digest in wanted.items() if manifest.inputs.get(name) != digest]
    if behind:
        raise DataError(f"{stage}: what it made is older than {behind[0]}; {_made_by(recipe, stage)}")
    return manifest


def _ref(manifest: Manifest) -> ManifestRef:
    return manifest_ref(manifest.folder, manifest.digest)


def _missing(recipe: Recipe, stage: str) -> NotFinishedError:
    return NotFinishedError(f"{stage} is not finished for this recipe and its settings; {_made_by(recipe, stage)}")


def _made_by(recipe: Recipe, stage: str) -> str:
    return (
        f"`{local_command(f'sd3 demo --recipe {recipe.name}')}` with the same --set makes all that is missing,"
        f" the deployment '{stage}/{recipe.name}' this alone"
    )
