"""What the stages before left in the store, found from the recipe alone: so any stage can be started on its own.

A stage that is missing, or stands behind the one before it, is a DataError that names the deployment to run.
"""

from __future__ import annotations

from flows.home import pasted
from sd3core import specs
from sd3core.checkpoint import CheckpointRef, content_digest, list_checkpoints
from sd3core.data.manifest import MANIFEST, Manifest, ManifestRef, manifest_ref, read_manifest
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.recipe import Recipe, Training
from sd3core.towers import TowersManifest, read_towers
from workers.stage_notes import recall_stage


class NotFinishedError(DataError):
    """A stage that this recipe needs has not been made to its end."""


def raw(recipe: Recipe, store: Store) -> ManifestRef:
    return _ref(_manifest(recipe, store, specs.raw_folder(recipe), "ingest", "ingest"))


def towers_manifest(recipe: Recipe, store: Store) -> TowersManifest:
    folder = specs.towers_folder(recipe)
    if not store.exists(f"{folder}/{MANIFEST}"):
        raise _missing(recipe, "towers")
    return read_towers(store, folder)


def towers(recipe: Recipe, store: Store) -> ManifestRef:
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


def train_fields(recipe: Recipe, store: Store, phase_key: str) -> dict[str, object]:
    """What the checkpoints of a phase depend on; finding them needs the phase before to be finished."""
    phase = dict(recipe.phases())[phase_key]
    start = start_of(recipe, store, phase_key)
    return specs.train_fields(
        recipe,
        phase,
        latents=latents(recipe, store, phase).digest,
        text=text(recipe, store).digest,
        init=content_digest(start) if start else None,
    )


def start_of(recipe: Recipe, store: Store, phase_key: str) -> str | None:
    """URL of what a phase starts from: the last checkpoint of the phase before; for the first one model.start_from."""
    keys = [key for key, _ in recipe.phases()]
    position = keys.index(phase_key)
    if position:
        return store.uri(last_checkpoint(recipe, store, keys[position - 1]).folder)
    return open_store(recipe.model.start_from).url if recipe.model.start_from else None


def checkpoints(recipe: Recipe, store: Store, phase_key: str) -> list[CheckpointRef]:
    """The finished checkpoints of a phase that has been trained to its end, oldest first."""
    folder = specs.checkpoints_folder(recipe, phase_key, train_fields(recipe, store, phase_key))
    found = list_checkpoints(store, folder)
    wanted = dict(recipe.phases())[phase_key].samples
    if not found or found[-1].samples < wanted:
        raise _missing(recipe, phase_key.partition(".")[0])
    return found


def last_checkpoint(recipe: Recipe, store: Store, phase_key: str) -> CheckpointRef:
    return checkpoints(recipe, store, phase_key)[-1]


def _manifest(recipe: Recipe, store: Store, folder: str, stage: str, note: str) -> Manifest:
    """The manifest that this run last used (its stage note `note` says which), else the folder's newest.

    Runs whose data differ only in the number of images share a folder, so the newest may be another run's.
    """
    if not store.exists(f"{folder}/{MANIFEST}"):
        raise _missing(recipe, stage)
    used = recall_stage(store, recipe.run, note)
    if used is not None and used.folder == folder and store.exists(manifest_ref(folder, used.digest).path):
        return read_manifest(store, folder, used.digest)
    return read_manifest(store, folder)


def _up_to_date(recipe: Recipe, manifest: Manifest, stage: str, **inputs: ManifestRef | None) -> Manifest:
    wanted = {name: ref.digest for name, ref in inputs.items() if ref is not None}
    behind = [name for name, digest in wanted.items() if manifest.inputs.get(name) != digest]
    if behind:
        raise DataError(
            f"{stage}: what it made is older than {behind[0]}; run `{_deployment_run(recipe, stage)}` first"
        )
    return manifest


def _ref(manifest: Manifest) -> ManifestRef:
    return manifest_ref(manifest.folder, manifest.digest)


def _missing(recipe: Recipe, stage: str) -> NotFinishedError:
    return NotFinishedError(
        f"{stage} is not finished for this recipe; run `{_deployment_run(recipe, stage)}` first, or 'pipeline/{recipe.name}' for all"
    )


def _deployment_run(recipe: Recipe, stage: str) -> str:
    return pasted(f"prefect deployment run '{stage}/{recipe.name}'")
