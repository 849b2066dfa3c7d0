"""The judge's features of held-out images, which FID compares pictures with.

They are made once and kept with their digest.
"""

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
from sd3core.data.images import PixelRules
from sd3core.data.kept_rows import ALL_ROWS, KeptRows
from sd3core.data.manifest import Manifest, ManifestRef
from sd3core.data.size_rule import SizeRule
from sd3core.data.split_rows import DECODE_BATCH, read_row_images, read_rows
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.specs import DONE_FILE, fingerprint, references_folder

if TYPE_CHECKING:
    from sd3core.towers.judge import Judge

REFERENCE_FORMAT = 1  # of the stored features; raise it when preprocessing changes


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


def reference_fields(
    raw: ManifestRef,
    judge_digest: str,
    side_px: int,
    limit: int,
    kept: dict[str, str] | None = None,
    sizes: SizeRule | None = None,
) -> dict[str, object]:
    """What decides the reference set and its features: the readable half of a score's protocol.

    `kept`: which rows a filter keeps, where it leaves out some. `sizes`: of a phase that leaves out images. Without them the fields
    are those from before there were such.
    """
    rule = (kept or {}) | (sizes.to_dict() if sizes else {})
    fields = {"format": REFERENCE_FORMAT, "raw": raw.digest, "judge": judge_digest, "side_px": side_px, "limit": limit}
    return fields | rule


def reference_features(
    store: Store,
    name: str,
    raw: Manifest,
    judge: Judge,
    fields: dict[str, object],
    rules: PixelRules,
    on_images: Callable[[int, int], None] | None = None,
    checked: CheckedFiles | None = None,
    kept: KeptRows = ALL_ROWS,
) -> Reference:
    """The judge's features of the held-out images, from references/NAME/SPEC, and written there when they are missing or
    not what their record says.

    Two workers may make them at once: they write the same bytes.
    """
    folder = references_folder(name, fingerprint(fields))
    standing, damaged = _standing_reference(store, folder)
    if standing is not None:
        return standing
    from sd3core.metrics.clip_score import (
        image_embeddings,  # loads transformers, which planning does not need
    )

    rows = read_rows(store, raw, "held_out", int(fields["limit"]), sizes=SizeRule.of_dict(fields), kept=kept)
    parts = []
    for start in range(0, len(rows), DECODE_BATCH):
        batch = rows[start : start + DECODE_BATCH]
        images = read_row_images(store, raw, batch, int(fields["side_px"]), rules, checked)
        parts.append(image_embeddings(judge, images))
        if on_images is not None:
            on_images(start + len(images), len(rows))
    features = np.concatenate(parts) if parts else image_embeddings(judge, [])
    data = save_arrays({"features": features})
    store.put(f"{folder}/features.safetensors", data)
    keys = [row.key for row in rows]
    store.put_json(
        f"{folder}/{DONE_FILE}", {"fields": fields, "keys": keys, "sha256": hashlib.sha256(data).hexdigest()}
    )
    return Reference(features, keys, damaged)


def _standing_reference(store: Store, folder: str) -> tuple[Reference | None, str | None]:
    """(what stands, the file that is damaged)."""
    path = f"{folder}/features.safetensors"
    try:
        done = store.get_json(f"{folder}/{DONE_FILE}")
        data, keys = store.get(path), [str(key) for key in done["keys"]]
        if done["sha256"] != hashlib.sha256(data).hexdigest():
            return None, path
        if fingerprint(done["fields"]) != folder.rpartition("/")[2]:
            return None, f"{folder}/{DONE_FILE}"
        features = load_arrays(data)["features"]
    except StoreNotFound:
        return None, None
    except (StoreDamaged, KeyError, TypeError, SafetensorError):
        return None, f"{folder}/{DONE_FILE}"
    return (Reference(features, keys), None) if len(keys) == len(features) else (None, f"{folder}/{DONE_FILE}")
