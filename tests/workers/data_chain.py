"""The data stages on a world as small as they take: what tests of single parts start from."""

from __future__ import annotations

from dataclasses import dataclass

from sd3core.data.manifest import ManifestRef
from sd3core.data.store import Store
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.encode import encode_phase, encode_stage
from workers.ingest import ingest_stage
from workers.stage import StageResult
from workers.towers import towers_stage


def small_recipe(*overrides: str) -> Recipe:
    """One actor: to load the models takes longer than the work that two would share."""
    sizes = ["data.images=32", "data.rows_per_shard=16", "towers.small.images=16", "towers.small.vae.steps=2"]
    return load_recipe("tiny-test", [*sizes, "compute.actors=1", "compute.object_store_mb=80", *overrides])


@dataclass(frozen=True)
class Chain:
    recipe: Recipe
    store: Store
    raw: StageResult
    towers: StageResult
    captions: StageResult | None
    encoded: dict[str, StageResult]  # the parts

    @property
    def results(self) -> list[StageResult]:
        return [r for r in (self.raw, self.towers, self.captions, *self.encoded.values()) if r is not None]


def run_chain(recipe: Recipe, store: Store, report=ignore_progress) -> Chain:
    raw = ingest_stage(recipe, store, report)
    towers = towers_stage(recipe, store, raw.manifest, report)
    captions = caption_stage(recipe, store, raw.manifest, report) if recipe.caption.captioner != "none" else None
    described = captions.manifest if captions else None
    encoded = encode_all(recipe, store, raw.manifest, described, towers.manifest, report)
    return Chain(recipe, store, raw, towers, captions, encoded)


def encode_all(
    recipe: Recipe,
    store: Store,
    raw: ManifestRef,
    captions: ManifestRef | None,
    towers: ManifestRef,
    report=ignore_progress,
    tell=lambda note: None,
    keep: ManifestRef | None = None,
) -> dict[str, StageResult]:
    """Text and the latents of every phase, in the order in which a run makes them, without the training between."""
    parts = dict(encode_stage(recipe, store, raw, captions, towers, report, tell, keep).parts)
    for key, _ in recipe.phases()[1:]:
        made = encode_phase(recipe, store, key, raw, parts["text"].manifest, towers, report, tell, keep, captions)
        parts[made.stage] = made
    return parts
