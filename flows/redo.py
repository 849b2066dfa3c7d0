"""`--from-stage S`: takes back the word that S and the stages after it are done, so that the next run of the pipeline makes them again.

Only markers go (manifests, done records, scores); the bytes stay until the same names are written anew. Shards and towers are shared
by every run that names the same data, so the other runs of that data find them undone as well.
"""

from __future__ import annotations

import difflib

from sd3core import specs
from sd3core.checkpoint import DONE_FILE
from sd3core.data.manifest import MANIFEST
from sd3core.data.shards import DONE
from sd3core.data.store import Store
from sd3core.errors import RecipeError
from sd3core.recipe import Recipe
from sd3core.specs import STAGES
from sd3core.towers import read_towers


def check_stage(name: str) -> None:
    """RecipeError for an unknown stage."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"--from-stage {name!r}: {meant}the stages are {', '.join(STAGES)}")


def forget_from(recipe: Recipe, store: Store, first: str) -> list[str]:
    """Undoes `first` and every stage after it, the last stage first. Returns the stages. RecipeError for an unknown stage.

    Call it under the run's lock: a training that goes on would not find its checkpoints when it next looks for them.
    """
    check_stage(first)
    stages = list(STAGES[STAGES.index(first) :])
    folders = {
        stage: _folders(recipe, store, stage) for stage in stages
    }  # before the towers that name some of them are undone
    for stage in reversed(stages):
        for folder in folders[stage]:
            for entry in store.list(folder):
                if _marks(stage, entry.path.rpartition("/")[2]):
                    store.delete(entry.path)
    return stages


def _folders(recipe: Recipe, store: Store, stage: str) -> list[str]:
    run = f"runs/{recipe.run}"
    if stage == "encode":
        towers = specs.towers_folder(recipe)
        if not store.exists(f"{towers}/{MANIFEST}"):
            return []  # nothing can have been encoded for this recipe
        digests = read_towers(store, towers).digests
        return [
            specs.text_folder(recipe, digests),
            *(specs.latents_folder(recipe, phase, digests) for _, phase in recipe.phases()),
        ]
    return {
        "ingest": [specs.raw_folder(recipe)],
        "towers": [specs.towers_folder(recipe)],
        "caption": [specs.captions_folder(recipe)],
        "pretrain": [f"{run}/checkpoints/pretrain"],
        "finetune": [f"{run}/checkpoints/{key}" for key, _ in recipe.phases()[1:]],
        "evaluate": [f"{run}/evaluations"],
        "export": [f"{run}/export"],
    }[stage]


def _marks(stage: str, name: str) -> bool:
    """Is this file the word that something is done?"""
    if stage in ("pretrain", "finetune"):
        return name == DONE_FILE
    if stage == "evaluate":
        return name.endswith(".json")
    return name == MANIFEST or name.endswith(DONE)
