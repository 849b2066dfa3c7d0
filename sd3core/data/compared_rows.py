"""Chooses the training and held-out rows whose captions are drawn for people.

The choice follows from hashes, so it is the same for all checkpoints of a phase, and a few indexes are read for it.
"""

from __future__ import annotations

from sd3core.data.encoded_shards import Split
from sd3core.data.manifest import Manifest
from sd3core.data.shards import read_shard_index
from sd3core.data.split_rows import Row, read_rows
from sd3core.data.store import Store

MOST_SHARDS = 64  # looked through for rows of a split: where none is found by then, there are hardly any


def compared_rows(
    store: Store, raw: Manifest, latents: Manifest, each: int, *, held_out: bool, captioned: bool
) -> list[tuple[Split, Row]]:
    """At most `each` rows that a phase trains on, then as many that are held out of it.

    Only rows with latents of the phase count: one that its filters or its encoder left out was not trained on. `held_out`: whether
    the recipe holds any out. `captioned`: with a caption of their own alone.
    """
    number_of = {shard.stem: shard.number for shard in raw.shards}
    encoded = {shard.number: shard for shard in latents.shards}

    def with_latents(stem: str) -> set[str]:
        shard = encoded.get(number_of[stem])
        if shard is None:
            return set()
        index = read_shard_index(store, latents.folder, shard.stem, shard.index_digest)
        return set(index["key"].to_pylist())

    splits: list[Split] = ["train", "held_out"] if held_out else ["train"]
    how = {"captioned": captioned, "only": with_latents, "most_shards": MOST_SHARDS}
    return [(split, row) for split in splits for row in read_rows(store, raw, split, each, **how)]
