"""`--from-stage S` takes back that S and the stages after it are done.

The next run of the pipeline makes them again.

Only markers go (manifests, done records, what was seen of files, scores), and only those of what this recipe makes with this version: what other settings
or a version before made stays done. The bytes stay until the same names are written anew. Shards and towers are shared by every
run that names the same data, so the other runs of that data find them undone as well.
"""

from __future__ import annotations

import difflib
from contextlib import suppress

from flows.upstream import Upstream
from sd3core import specs
from sd3core.data.store import Store
from sd3core.errors import RecipeError, StoreError, UserError
from sd3core.recipe import Recipe
from sd3core.specs import DONE, DONE_FILE, DUPLICATES, FORMATS, MANIFEST, SEEN, STAGES
from sd3core.towers.artifact import read_towers


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
    trained = _trained(recipe, store)
    found = {stage: _markers(recipe, store, stage, trained) for stage in stages}  # before any goes that names others
    for stage in reversed(stages):
        for path in found[stage]:
            store.delete(path)
    return stages


def _trained(recipe: Recipe, store: Store) -> dict[str, str]:
    """The folder of each phase's checkpoints. A phase is left out where what it starts from does not stand: nothing names its own."""
    found, upstream = {}, Upstream(recipe, store)
    for key, _ in recipe.phases():
        with suppress(UserError):
            found[key] = specs.checkpoints_folder(recipe, key, upstream.phase_inputs(key).fields)
    return found


def _markers(recipe: Recipe, store: Store, stage: str, trained: dict[str, str]) -> list[str]:
    """The files that say that something of a stage is done."""
    if stage == "evaluate":  # the table is made from the parts
        parts = (
            entry.path for entry in store.list(specs.evaluations_folder(recipe.run)) if entry.path.endswith(".json")
        )
        return [path for path in parts if _is_ours(store, path, trained, "checkpoint", "protocol", "evaluations")]
    if stage == "export":
        exported = (
            f"{specs.exports_folder(recipe.run, spec)}/{MANIFEST}"
            for spec in store.folders(specs.exports_folder(recipe.run))
        )
        return [path for path in exported if _is_ours(store, path, trained, "from", "fields", "export")]
    paths = [entry.path for folder in _folders(recipe, store, stage, trained) for entry in store.list(folder)]
    if stage == "filter":
        found = [path for path in paths if path.rpartition("/")[2].startswith(DUPLICATES) and path.endswith(".json")]
        return [*found, *(path for path in paths if path.endswith((MANIFEST, DONE)))]
    marks = DONE_FILE if stage in ("pretrain", "finetune") else (MANIFEST, DONE, SEEN)
    return [path for path in paths if path.rpartition("/")[2].endswith(marks)]


def _is_ours(store: Store, path: str, trained: dict[str, str], checkpoint: str, made_by: str, kind: str) -> bool:
    """Whether a record is of this recipe's checkpoints, in this version's format; also where that cannot be read from it."""
    try:
        record = store.get_json(path)
        ours = record[checkpoint].rpartition("/")[0] in trained.values()
        return ours and record[made_by]["format"] == FORMATS[kind]
    except (StoreError, KeyError, TypeError, AttributeError):
        return True


def _folders(recipe: Recipe, store: Store, stage: str, trained: dict[str, str]) -> list[str]:
    if stage == "encode":
        towers = specs.towers_folder(recipe)
        if not store.exists(f"{towers}/{MANIFEST}"):
            return []  # nothing can have been encoded for this recipe
        digests = read_towers(store, towers).digests
        return [
            specs.text_folder(recipe, digests),
            *(specs.latents_folder(recipe, phase, digests) for _, phase in recipe.phases()),
        ]
    if stage == "filter":
        chosen = recipe.filter
        measures = [specs.measures_folder(recipe)] if chosen is not None and chosen.measures else []
        return [*measures, specs.keep_folder(recipe)] if chosen is not None else []
    if stage in ("pretrain", "finetune"):
        return [folder for key, folder in trained.items() if key.partition(".")[0] == stage]
    return [
        {"ingest": specs.raw_folder, "towers": specs.towers_folder, "caption": specs.captions_folder}[stage](recipe)
    ]
