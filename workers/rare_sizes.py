"""Decides which rare sizes join others before latents are made, and says so.

A size is rare where fewer images to train on are nearest to its bucket than a batch has: a step would show the same few again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sd3core.buckets import Side, bucket_name, bucket_side, merged_buckets
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.raw_buckets import RawBuckets, Sides, after_merging, merges_of, merging_note
from sd3core.data.shards import parts_digest, shard_stem
from sd3core.data.store import Store
from sd3core.data.unit_counts import UnitCounts, small_buckets_warning
from sd3core.errors import DataError, StoreError
from sd3core.recipe import Recipe
from sd3core.specs import MANIFEST, latents_folder, latents_part
from sd3core.words import counted
from workers.inputs import InputShard
from workers.stage import recall_stage

NOT_COUNTED = "sizes with fewer images than a batch are told when encode begins: so many shards are not read here"
Merged = dict[Side, tuple[Side, set[int]]]  # bucket -> the one that its images go to, the shards that have such images


@dataclass(frozen=True)
class RareSizes:
    """What becomes of rare sizes in the latents of each phase, by its key."""

    merged: dict[str, Merged] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()  # phases whose latents stand without merges, and stay as they are


def rare_sizes(
    recipe: Recipe,
    store: Store,
    phases: Sequence[str],
    raw: Manifest,
    raw_digest: str,
    digests: dict[str, str],
    count: Callable[[Sequence[Sides]], list[RawBuckets] | None],
) -> RareSizes:
    """Of these phases, by the images to train on. Phases that share latents have what the first of them makes, for its batch.

    Latents of the same images that the run has noted without merges stay: what was trained on them would be trained again.
    `count` is asked once, and only where some phase can merge; its None, "not now", is a note.
    """
    own, first_of = dict(recipe.phases()), _first_of(recipe, digests)
    several = [key for key in phases if len(own[key].bucket_sides()) > 1]
    kept = {key for key in several if _stands_plain(recipe, store, first_of[key], raw, raw_digest, digests)}
    asked = [key for key in several if key not in kept]
    counts = count([tuple(own[key].bucket_sides()) for key in asked]) if asked else []
    if counts is None:
        return RareSizes(notes=(NOT_COUNTED,), kept=frozenset(kept))
    merged: dict[str, Merged] = {}
    notes: list[str] = []
    for key, rows in zip(asked, counts, strict=True):
        first_batch, batch = own[first_of[key]].global_batch, own[key].global_batch
        chosen = merges_of(rows, first_batch)
        merged[key] = {side: (target, rows.shards_with(side)) for side, target in chosen.items()}
        said = merging_note(rows, chosen, first_batch), small_buckets_warning(after_merging(rows, chosen), batch)
        notes += [f"{key}: {note}" for note in said if note]
    return RareSizes(merged, tuple(notes), frozenset(kept))


def own_merges(merged: Merged, number: int) -> dict[Side, Side]:
    """Of one shard: the buckets of its own images that are merged."""
    return {side: target for side, (target, numbers) in merged.items() if number in numbers}


def merged_digest(shard: InputShard, merges: dict[Side, Side]) -> str:
    """Names a latents shard by its images and by which of their buckets are merged: one without any is named as it ever was.

    So where a bucket comes to fill a batch only shards with images of it are made again, and all others of their images copied.
    """
    said = [f"{bucket_name(side)} in {bucket_name(target)}" for side, target in merges.items()]
    return parts_digest(shard.digest, *said) if said else shard.digest[:12]


def kept_note(counts: UnitCounts, global_batch: int) -> str | None:
    """What is said of latents that stand as they were, where merging would change them."""
    rows = dict(zip(map(bucket_side, counts.buckets), counts.rows.sum(axis=0, dtype=np.int64).tolist(), strict=True))
    images = sum(rows[side] for side in merged_buckets(rows, global_batch))
    if not images:
        return None
    return (
        f"{counted(images, 'image')} of sizes with fewer images than a batch of {global_batch} stay as they were encoded, in buckets of"
        " their own; `--from-stage encode` would crop them to the nearest size that has more"
    )


def _first_of(recipe: Recipe, digests: dict[str, str]) -> dict[str, str]:
    """Each phase -> the first one with the same latents."""
    folders = {key: latents_folder(recipe, phase, digests) for key, phase in recipe.phases()}
    firsts: dict[str, str] = {}
    return {key: firsts.setdefault(folder, key) for key, folder in folders.items()}


def _stands_plain(
    recipe: Recipe, store: Store, first: str, raw: Manifest, raw_digest: str, digests: dict[str, str]
) -> bool:
    """Whether the run has noted whole latents of just these images whose shards are named without merges.

    What another run has left decides nothing: the same recipe makes the same latents in any store.
    """
    folder = latents_folder(recipe, dict(recipe.phases())[first], digests)
    note = recall_stage(store, recipe.run, latents_part(first))
    if (
        note is None or note.folder != folder or not store.exists(f"{folder}/{MANIFEST}")
    ):  # or taken back (--from-stage)
        return False
    try:
        made = read_manifest(store, folder, note.digest)
    except (DataError, StoreError):
        return False
    plain = [shard_stem(shard.number, shard.digest) for shard in raw.shards]
    return made.inputs == {"raw": raw_digest} and [shard.stem for shard in made.shards] == plain
