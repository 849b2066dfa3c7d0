"""Settles what a data set's encoders compute in, where a recipe says `auto`.

It is settled once, also for the captioner. What has been made decides: first what the run has trained on, then what the data
set has of captions, text or latents, which goes on in their precision, whatever machines and versions come later. So `auto`
makes nothing again. Only bf16 is written down (datasets/NAME/PRECISION.json), where nothing stands yet, also where a recipe
names it: what stands without a word was made in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.errors import DataError
from sd3core.recipe import Recipe
from sd3core.recipe_compute import ActorStage
from sd3core.specs import data_folder, precision_path, stage_note_path

SettledPrecision = Literal["bf16", "fp32"]
PLACES: dict[str, tuple[str, str, ActorStage]] = {  # what is made -> the recipe's section and key, and who makes it
    "captions": ("caption", "precision", "caption"),
    "text": ("encode", "text_precision", "encode"),
    "latents": ("encode", "latent_precision", "encode"),
}
NOTES = {"captions": "caption", "text": "text", "latents": "latents.pretrain"}  # a run's, of what it last used


def settle_precisions(recipe: Recipe, store: Store, gpus_have_bf16: Callable[[], bool] | None = None) -> Recipe:
    """The recipe with bf16 or fp32 for every `auto` of its encoders and captioner.

    `gpus_have_bf16`: of the machines that work now, asked only where nothing has been made and the actors have GPUs; what it
    decides is written down. None: nothing is made now, so what has not been settled stays open, and counts as bf16 on GPUs.
    """
    asked = {kind: getattr(getattr(recipe, section), key) for kind, (section, key, _) in PLACES.items()}
    if set(asked.values()) == {"fp32"}:
        return recipe
    noted = _read(store, recipe.data.name)
    settled = {
        kind: _settled(recipe, store, kind, noted, gpus_have_bf16) if precision == "auto" else precision
        for kind, precision in asked.items()
    }
    first = {
        kind: precision
        for kind, precision in settled.items()
        if precision == "bf16" and kind not in noted and not _stands(recipe, store, kind)
    }
    if gpus_have_bf16 is not None and first:
        store.put_json(precision_path(recipe.data.name), noted | first)
    for kind, (section, key, _) in PLACES.items():
        part = getattr(recipe, section).model_copy(update={key: settled[kind]})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def _settled(
    recipe: Recipe,
    store: Store,
    kind: str,
    noted: dict[str, SettledPrecision],
    gpus_have_bf16: Callable[[], bool] | None,
) -> SettledPrecision:
    if own := _noted_by_run(recipe, store, kind):
        return own
    if kind in noted:
        return noted[kind]
    if recipe.compute.for_stage(PLACES[kind][2]).gpus_per_actor == 0 or _stands(recipe, store, kind):
        return "fp32"
    return "bf16" if gpus_have_bf16 is None or gpus_have_bf16() else "fp32"


def _stands(recipe: Recipe, store: Store, kind: str) -> bool:
    return bool(store.folders(data_folder(recipe.data.name, kind)))


def _noted_by_run(recipe: Recipe, store: Store, kind: str) -> SettledPrecision | None:
    """What the run's note of its stage says that it last used; None where it has none."""
    try:
        note = store.get_json(stage_note_path(recipe.run, NOTES[kind]))
    except (StoreNotFound, StoreDamaged):
        return None
    fields = note.get("fields") or {} if isinstance(note, dict) else {}
    fields = fields.get("caption") or {} if kind == "captions" else fields
    return "bf16" if fields.get("precision") == "bf16" else "fp32"


def _read(store: Store, name: str) -> dict[str, SettledPrecision]:
    path = precision_path(name)
    try:
        noted = store.get_json(path)
    except StoreNotFound:
        return {}
    if not isinstance(noted, dict) or any(kind not in PLACES or said != "bf16" for kind, said in noted.items()):
        raise DataError(
            f"{store.uri(path)}: does not say which of {', '.join(PLACES)} are made in bf16; write what was, as"
            ' {"text": "bf16"}, or name the precision in the recipe (encode.text_precision, encode.latent_precision,'
            " caption.precision)"
        )
    return noted
