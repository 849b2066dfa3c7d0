"""Rows and images of one split of the raw data, in an order that follows a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

from sd3core.data.checked_files import CheckedFiles
from sd3core.data.images import PixelRules, crop_to, decode_image
from sd3core.data.kept_rows import ALL_ROWS, KeptRows
from sd3core.data.manifest import Manifest
from sd3core.data.records import FileRecord
from sd3core.data.shards import image_of, not_of_its_manifest, read_samples, read_shard_index, sample_id
from sd3core.data.size_rule import SizeRule
from sd3core.data.store import Store
from sd3core.specs import TAR

DECODE_BATCH = 64


@dataclass(frozen=True)
class Row:
    """One image of the raw data set and where its sample lies."""

    key: str
    caption: str  # the first, where it has several: for the judge, previews and prompts
    stem: str
    offset: int
    length: int


def read_rows(
    store: Store,
    raw: Manifest,
    split: str,
    limit: int,
    *,
    captioned: bool = False,
    sizes: SizeRule | None = None,
    kept: KeptRows = ALL_ROWS,
    only: Callable[[str], Container[str]] | None = None,
    most_shards: int | None = None,
) -> list[Row]:
    """At most `limit` rows of a split ("held_out" or "train"), the same for the same manifest; `captioned` skips empty
    captions, `sizes` images that a phase leaves out, `kept` rows that a filter does.

    only(stem): the keys of a shard that count, of those that are there. `most_shards`: that are looked at, where rows are rare.

    Shards, then rows, are taken in the order of a hash, so the choice does not follow the order of the data, and of a
    large data set only as many indexes are read as are needed.
    """
    rows: list[Row] = []
    for shard in sorted(raw.shards, key=lambda entry: hashlib.sha256(entry.stem.encode()).digest())[:most_shards]:
        if len(rows) >= limit:
            break
        columns, keys = ["key", "caption", "offset", "length", "split"], only(shard.stem) if only else None
        index = read_shard_index(store, raw.folder, shard.stem, shard.index_digest)
        index = kept.taken_of(store, shard.number, index)
        index = sizes.taken_of(index) if sizes else index
        for row in index.select(columns).to_pylist():
            counts = row.pop("split") == split and (keys is None or row["key"] in keys)
            if counts and (row["caption"] or not captioned):
                rows.append(Row(stem=shard.stem, **row))
    return sorted(rows, key=lambda row: sample_id(row.key))[:limit]


def read_row_images(
    store: Store,
    raw: Manifest,
    rows: list[Row],
    side_px: int,
    rules: PixelRules,
    checked: CheckedFiles | None = None,
) -> np.ndarray:
    """(n, side, side, 3) uint8: square centre crops, as training takes them.

    Rows are read by their ranges; with `checked`, shards on this machine are compared with the manifest first. DataError
    where one is damaged.
    """
    images = read_row_crops(store, raw, rows, [(side_px, side_px)] * len(rows), rules, checked)
    return np.stack(images) if images else np.zeros((0, side_px, side_px, 3), dtype=np.uint8)


def read_row_crops(
    store: Store,
    raw: Manifest,
    rows: Sequence[Row],
    sides: Sequence[tuple[int, int]],
    rules: PixelRules,
    checked: CheckedFiles | None = None,
) -> list[np.ndarray]:
    """As `read_row_images`, each row in a height and width of its own: (height, width, 3) uint8."""
    _check_shards(store, raw, {row.stem for row in rows}, checked)
    images = []
    for row, (height, width) in zip(rows, sides, strict=True):
        data = store.get_range(f"{raw.folder}/{row.stem}{TAR}", row.offset, row.length)
        (_, files), *_ = read_samples(data)
        image = image_of(files, f"{store.uri(raw.folder)}/{row.stem}.tar: {row.key}")
        images.append(crop_to(decode_image(image, rules), height, width)[0])
    return images


def _check_shards(store: Store, raw: Manifest, stems: set[str], checked: CheckedFiles | None) -> None:
    if checked is None:
        return
    for entry in (shard for shard in raw.shards if shard.stem in stems):
        path = f"{raw.folder}/{entry.stem}{TAR}"
        local = store.local_path(path)
        if local is not None and not checked.is_whole(local, FileRecord(sha256=entry.digest, bytes=store.size(path))):
            raise not_of_its_manifest(store.uri(path))
