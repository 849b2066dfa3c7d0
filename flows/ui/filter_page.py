"""What the filter's page shows: how many images go, why, and some of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sd3core.data.images import PixelRules
from sd3core.data.manifest import Manifest, ManifestRef, ShardEntry, read_manifest
from sd3core.data.shards import read_shard_index
from sd3core.data.split_rows import Row, read_row_images
from sd3core.data.store import Store
from sd3core.errors import DataError
from sd3core.filters.row_rules import DUPLICATE, LEAKED, NOT_MEASURED
from sd3core.pictures import make_grid, page_jpeg
from sd3core.recipe import Recipe
from sd3core.recipe_filter import Filter
from workers.caches import checked_here

PICTURES_A_REASON = 6  # of each reason
SHARDS_LOOKED_AT = 8  # for them, at most, of each reason
SHOWN_SIDE_PX = 96


def funnel_table(store: Store, keep: ManifestRef) -> list[dict[str, object]]:
    """From all images to those that stay, a row a reason, the most frequent first."""
    manifest = read_manifest(store, keep.folder, keep.digest)
    reasons = sorted(manifest.failed_reasons.items(), key=lambda item: (-item[1], item[0]))
    images = manifest.rows + sum(count for _, count in reasons)
    rows: list[tuple[str, int]] = [("images ingested", images), *reasons, ("images kept", manifest.rows)]
    return [
        {"what": what, "images": f"{count:,}", "of all": f"{count / images:.2%}" if images else ""}
        for what, count in rows
    ]


def rules_table(rules: Filter) -> list[dict[str, object]]:
    """Every rule that the recipe names, with its value as it was settled."""
    fields: dict[str, Any] = {name: value for name, value in rules.model_dump(exclude_none=True).items() if value}
    if rules.duplicates is not None:
        fields["duplicates"]["threshold"] = rules.duplicates.alike_from
        fields["duplicates"].setdefault("model", "built-in hash")
    return [{"rule": f"filter.{name}", "value": f"{value}"} for name, value in _flat(fields).items()]


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def left_out_pictures(recipe: Recipe, store: Store, raw: ManifestRef, keep: ManifestRef) -> dict[str, bytes]:
    """Caption -> JPEG, for every reason but of what cannot be decoded; below a near-duplicate stands the image that is kept for it."""
    images, kept = (read_manifest(store, ref.folder, ref.digest) for ref in (raw, keep))
    entries = {entry.number: entry for entry in images.shards}
    pictures = {}
    for reason in kept.failed_reasons:
        gone: list[Row] = []
        others: list[Row] = []
        for entry in [entry for entry in kept.shards if reason in entry.failed][:SHARDS_LOOKED_AT]:
            told = read_shard_index(store, kept.folder, entry.stem, entry.index_digest).to_pylist()
            chosen = [row for row in told if row["reason"] == reason][: PICTURES_A_REASON - len(gone)]
            gone += _rows(store, images, entries[entry.number], [row["key"] for row in chosen])
            if reason in (DUPLICATE, LEAKED):
                for row in chosen:
                    others += _rows(store, images, entries[row["duplicate_of_shard"]], [row["duplicate_of"]])
            if len(gone) == PICTURES_A_REASON:
                break
        try:
            shown = _pictures(recipe, store, images, [*gone, *others])
        except DataError:
            if reason == NOT_MEASURED:  # it may be for that
                continue
            raise
        says = f"left out: {reason}" + ("; below each, the one that stays" if others else "")
        pictures[says] = page_jpeg(make_grid(list(shown), len(gone)))
    return pictures


def _rows(store: Store, raw: Manifest, shard: ShardEntry, keys: list[str]) -> list[Row]:
    """In the order of the keys."""
    index = read_shard_index(store, raw.folder, shard.stem, shard.index_digest)
    columns = ["key", "caption", "offset", "length"]
    rows = {row["key"]: row for row in index.select(columns).to_pylist() if row["key"] in keys}
    return [Row(stem=shard.stem, **rows[key]) for key in keys]


def _pictures(recipe: Recipe, store: Store, raw: Manifest, rows: list[Row]) -> np.ndarray:
    return read_row_images(store, raw, rows, SHOWN_SIDE_PX, PixelRules.of(recipe.data), checked_here())
