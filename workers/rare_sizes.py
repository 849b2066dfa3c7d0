"""Decides which images a phase takes, and which rare sizes join others.

It is told before latents are made. An image that would be enlarged beyond the phase's `min_scale` is left out. Of the others a size is rare where fewer images to train
on are nearest to its bucket than a batch has: a step would show the same few again.

Neither rule is in the fingerprint of latents: a shard is named by what they do to its own images, so that one to which they do
nothing is named, and made, as it ever was. What a run has made before there was a rule stays until its images change, or
`--from-stage encode`: what was trained on it would be trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sd3core.buckets import Side, bucket_name, bucket_side, merged_buckets
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.raw_buckets import RawBuckets, after_merging, merges_of, merging_note, too_small_note
from sd3core.data.shards import parts_digest, shard_stem
from sd3core.data.size_rule import NO_ENLARGEMENT, SizeRule
from sd3core.data.store import Store
from sd3core.data.unit_counts import UnitCounts, small_buckets_warning
from sd3core.errors import DataError, StoreError
from sd3core.recipe import Recipe
from sd3core.specs import MANIFEST, latents_folder, latents_part
from sd3core.words import counted
from workers.inputs import Images, InputShard
from workers.stage import StageNote, recall_stage

NOT_COUNTED = (
    "images too small for a phase, and sizes with fewer images than a batch, are told when encode begins: so many shards are"
    " not read here"
)
MIN_SCALE = "min_scale"  # of a note of latents: what they were made with; absent of those from before there was one
Merged = dict[Side, tuple[Side, set[int]]]  # bucket -> the one that its images go to, the shards that have such images


@dataclass(frozen=True)
class RareSizes:
    """What becomes of images that are too small, and of rare sizes, in the latents of each phase, by its key."""

    rules: dict[str, SizeRule]
    left_out: dict[str, dict[int, int]] = field(
        default_factory=dict
    )  # images that are too small, by their shard's number
    merged: dict[str, Merged] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()  # phases whose latents stand without merges, and stay as they are
    enlarged: frozenset[str] = frozenset()  # phases whose latents stand from before there was min_scale, likewise


def rare_sizes(
    recipe: Recipe,
    store: Store,
    phases: Sequence[str],
    images: Images,
    digests: dict[str, str],
    count: Callable[[Sequence[SizeRule]], list[RawBuckets] | None],
) -> RareSizes:
    """Of these phases. Phases that share latents have what the first of them makes, for its batch.

    `count` is asked once, and only where some phase can leave out or merge; its None, "not now", is a note. DataError where no
    image is large enough for a phase.
    """
    own, first_of = dict(recipe.phases()), _first_of(recipe, digests)
    standing = {key: _Standing(recipe, store, first_of[key], images, digests) for key in phases}
    enlarged = {key for key in phases if standing[key].is_before_scales}
    rules = {key: SizeRule(tuple(own[key].bucket_sides()), own[key].min_scale) for key in phases}
    rules |= {key: SizeRule(rules[key].sides) for key in enlarged}
    several = [key for key in phases if len(rules[key].sides) > 1]
    kept = {key for key in several if standing[key].is_plain}
    asked = [key for key in phases if (key in several and key not in kept) or rules[key].min_scale]
    counts = count([rules[key] for key in asked]) if asked else []
    if counts is None:
        return RareSizes(rules, notes=(NOT_COUNTED,), kept=frozenset(kept), enlarged=frozenset(enlarged))
    left_out: dict[str, dict[int, int]] = {}
    merged: dict[str, Merged] = {}
    notes: list[str] = []
    for key, rows in zip(asked, counts, strict=True):
        left_out[key] = rows.left_out()
        said = [too_small_note(rows, rules[key].min_scale)]
        if left_out[key] and not rows.rows.any():
            raise DataError(
                f"{key}: no image is large enough for side_px {own[key].side_px}, and none is enlarged beyond min_scale"
                f" {rules[key].min_scale:g}; lower {key}.side_px or {key}.min_scale"
            )
        if key in several and key not in kept:
            first_batch = own[first_of[key]].global_batch
            chosen = merges_of(rows, first_batch)
            merged[key] = {side: (target, rows.shards_with(side)) for side, target in chosen.items()}
            said.append(merging_note(rows, chosen, first_batch))
            said.append(small_buckets_warning(after_merging(rows, chosen), own[key].global_batch))
        notes += [f"{key}: {note}" for note in said if note]
    return RareSizes(rules, left_out, merged, tuple(notes), frozenset(kept), frozenset(enlarged))


def own_merges(merged: Merged, number: int) -> dict[Side, Side]:
    """Of one shard: the buckets of its own images that are merged."""
    return {side: target for side, (target, numbers) in merged.items() if number in numbers}


def latents_digest(shard: InputShard, merges: dict[Side, Side], too_small: int = 0) -> str:
    """Names a latents shard by its images, by which of their buckets are merged, and by how many images are too small, which says
    which they are: one to whose images nothing is done is named as it ever was.

    So where a bucket comes to fill a batch, or min_scale changes, only shards with images of it are made again, and all others of
    their images copied.
    """
    said = [f"{bucket_name(side)} in {bucket_name(target)}" for side, target in merges.items()]
    said += [f"{too_small} too small"] if too_small else []
    return parts_digest(shard.content, *said) if said else shard.content[:12]


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


class _Standing:
    """What the run has noted of whole latents of just these images, made for a phase.

    What another run has left decides nothing: the same recipe makes the same latents in any store.
    """

    def __init__(self, recipe: Recipe, store: Store, first: str, images: Images, digests: dict[str, str]) -> None:
        self.images, phase = images, dict(recipe.phases())[first]
        self.min_scale = phase.min_scale
        self.note: StageNote | None = recall_stage(store, recipe.run, latents_part(first))
        self.made = self._noted(store, latents_folder(recipe, phase, digests))

    def _noted(self, store: Store, folder: str) -> Manifest | None:
        note = self.note
        # or taken back (--from-stage)
        if note is None or note.folder != folder or not store.exists(f"{folder}/{MANIFEST}"):
            return None
        try:
            made = read_manifest(store, folder, note.digest)
        except (DataError, StoreError):
            return None
        return made if made.inputs == self.images.inputs else None

    @property
    def is_before_scales(self) -> bool:
        """Whether it was made before there was a min_scale, and the recipe asks for none but the one that all have since."""
        return self.made is not None and MIN_SCALE not in self.note.fields and self.min_scale == NO_ENLARGEMENT

    @property
    def is_plain(self) -> bool:
        """Whether its shards are named without merges, with the min_scale of today's recipe or before there was one.

        What was made before there was one took all images, as min_scale 0 does.
        """
        if self.made is None or not (self.is_before_scales or self.note.fields.get(MIN_SCALE, 0.0) == self.min_scale):
            return False
        plain = [shard_stem(number, shard.content) for number, shard in self.images.shards.items()]
        return [shard.stem for shard in self.made.shards] == plain
