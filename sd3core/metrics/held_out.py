"""The held-out part of a data set as evaluation uses it: prompts, images, and the judge's features of them, made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from sd3core.data.checked_files import CheckedFiles
from sd3core.data.images import PixelRules, crop_to, decode_image
from sd3core.data.manifest import Manifest
from sd3core.data.shards import image_of, not_of_its_manifest, read_index, read_samples, sample_id
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.specs import fingerprint

if TYPE_CHECKING:
    from sd3core.judge import Judge

REFERENCE_FORMAT = 1  # of the stored features; raise it when preprocessing changes
DECODE_BATCH = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """The judge's features (n, D) of held-out images and the keys of their rows."""

    features: np.ndarray
    keys: list[str]
    damaged: str | None = None  # the stored file for which they were made again

    def of(self, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(positions of those keys that are here, their features)."""
        place = {key: position for position, key in enumerate(self.keys)}
        found = [position for position, key in enumerate(keys) if key in place]
        return np.array(found, dtype=np.int64), self.features[[place[keys[position]] for position in found]]


@dataclass(frozen=True)
class Row:
    """One image of the raw data set and where its sample lies."""

    key: str
    caption: str
    stem: str
    offset: int
    length: int


def read_rows(store: Store, raw: Manifest, split: str, limit: int, *, captioned: bool = False) -> list[Row]:
    """At most `limit` rows of a split ("held_out" or "train"), the same for the same manifest; `captioned` skips empty
    captions.

    Shards, then rows, are taken in the order of a hash, so the choice does not follow the order of the data, and of a
    large data set only as many indexes are read as are needed.
    """
    rows: list[Row] = []
    for shard in sorted(raw.shards, key=lambda entry: hashlib.sha256(entry.stem.encode()).digest()):
        if len(rows) >= limit:
            break
        columns = ["key", "caption", "offset", "length", "split"]
        for row in read_index(store, raw.folder, shard.stem, shard.index_digest).select(columns).to_pylist():
            if row.pop("split") == split and (row["caption"] or not captioned):
                rows.append(Row(stem=shard.stem, **row))
    return sorted(rows, key=lambda row: sample_id(row.key))[:limit]


def read_images(
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
    _check_shards(store, raw, {row.stem for row in rows}, checked)
    images = []
    for row in rows:
        data = store.get_range(f"{raw.folder}/{row.stem}.tar", row.offset, row.length)
        (_, files), *_ = read_samples(data)
        image = image_of(files, f"{store.uri(raw.folder)}/{row.stem}.tar: {row.key}")
        images.append(crop_to(decode_image(image, rules), side_px, side_px)[0])
    return np.stack(images) if images else np.zeros((0, side_px, side_px, 3), dtype=np.uint8)


def _check_shards(store: Store, raw: Manifest, stems: set[str], checked: CheckedFiles | None) -> None:
    if checked is None:
        return
    for entry in (shard for shard in raw.shards if shard.stem in stems):
        path = f"{raw.folder}/{entry.stem}.tar"
        local = store.local_path(path)
        if local is not None and not checked.is_whole(local, entry.digest, store.size(path)):
            raise not_of_its_manifest(store.uri(path))


def reference_fields(raw: Manifest, judge_digest: str, side_px: int, limit: int) -> dict[str, object]:
    """What decides the reference set and its features: the readable half of a score's protocol."""
    return {"format": REFERENCE_FORMAT, "raw": raw.digest, "judge": judge_digest, "side_px": side_px, "limit": limit}


def reference_features(
    store: Store,
    name: str,
    raw: Manifest,
    judge: Judge,
    fields: dict[str, object],
    rules: PixelRules,
    on_images: Callable[[int, int], None] | None = None,
    checked: CheckedFiles | None = None,
) -> Reference:
    """The judge's features of the held-out images, from references/NAME/SPEC, and written there when they are missing or
    not what their record says.

    Two workers may make them at once: they write the same bytes.
    """
    folder = f"references/{name}/{fingerprint(fields)}"
    standing, damaged = _standing_reference(store, folder)
    if standing is not None:
        return standing
    from sd3core.metrics.clip_score import (
        image_embeddings,  # loads transformers, which planning does not need
    )

    rows, parts = read_rows(store, raw, "held_out", int(fields["limit"])), []
    for start in range(0, len(rows), DECODE_BATCH):
        batch = rows[start : start + DECODE_BATCH]
        images = read_images(store, raw, batch, int(fields["side_px"]), rules, checked)
        parts.append(image_embeddings(judge, images))
        if on_images is not None:
            on_images(start + len(images), len(rows))
    features = np.concatenate(parts) if parts else image_embeddings(judge, [])
    data = save_arrays({"features": features})
    store.put(f"{folder}/features.safetensors", data)
    keys = [row.key for row in rows]
    store.put_json(f"{folder}/DONE.json", {"fields": fields, "keys": keys, "sha256": hashlib.sha256(data).hexdigest()})
    return Reference(features, keys, damaged)


def _standing_reference(store: Store, folder: str) -> tuple[Reference | None, str | None]:
    """(what stands, the file that is damaged)."""
    path = f"{folder}/features.safetensors"
    try:
        done = store.get_json(f"{folder}/DONE.json")
        data, keys = store.get(path), [str(key) for key in done["keys"]]
        if done["sha256"] != hashlib.sha256(data).hexdigest():
            return None, path
        if fingerprint(done["fields"]) != folder.rpartition("/")[2]:
            return None, f"{folder}/DONE.json"
        features = load_arrays(data)["features"]
    except StoreNotFound:
        return None, None
    except (StoreDamaged, KeyError, TypeError, SafetensorError):
        return None, f"{folder}/DONE.json"
    return (Reference(features, keys), None) if len(keys) == len(features) else (None, f"{folder}/DONE.json")
