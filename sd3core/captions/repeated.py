"""Finds captions that stand on more than a stated share of all images.

No shard sees that alone. Beside each table of captions lies an index with 16 bytes for a sampled image: a hash of its key and one
of its caption. All images are sampled up to SAMPLED_IMAGES of a data set, above that those whose keys have the smallest hashes: a
fixed sample, which a grown data set thins out. When a stage has all its captions, one process reads the indexes once, a request
a shard (of 100,000 shards 11 s of CPU and 150 MB), and holds the sample. What it finds is a record beside the manifest, a function
of that manifest and the share alone; so a process that dies before it is written costs the count, and nobody's captions. The model
is not asked again.

Up to SAMPLED_IMAGES the count is exact. Above, a share of 0.001 is met by 1,000 images of the sample, and is off by 3 % of itself
(one standard deviation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sd3core.data.manifest import Manifest, ManifestRef, ShardEntry, read_manifest
from sd3core.data.records import own_digest, sealed
from sd3core.data.shards import read_shard_index, read_table, sample_id
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.errors import DataError
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.shown_text import shortened
from sd3core.specs import fingerprint

SAMPLED_IMAGES = 1 << 20
HASHES = 1 << 63  # of keys: sd3core.data.shards.sample_id
REPEATED_AT_LEAST = 20  # images: a small data set's share may be one image
INDEX_READERS = 32
SHARDS_READ_TOGETHER = (
    1024  # their answers, for as long as they are not counted, are all that is held beside the sample
)
TEXTS_SHOWN, TEXT_CHARS = 8, 300
REPEATED_RECORD = "REPEATED."  # begins the record's name, beside the manifest
NO_HASH = 0  # in place of a caption's hash


def sample_bound(images: int) -> int:
    """Key hashes below it are in the sample of a data set of so many images."""
    return HASHES if images <= SAMPLED_IMAGES else HASHES * SAMPLED_IMAGES // images


def caption_hash(caption: str) -> int:
    """63 bits of a caption's SHA-256, never NO_HASH."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") % (HASHES - 1) + 1


def caption_index(rows: Iterable[tuple[str, str]], bound: int) -> pa.Table:
    """The index beside a shard's table, of its (key, caption)s; "" is no caption. It holds the keys that hash below `bound`."""
    sampled = [(hashed, caption) for key, caption in rows if (hashed := sample_id(key)) < bound]
    columns = {
        "key_hash": pa.array([hashed for hashed, _ in sampled], pa.int64()),
        "caption_hash": pa.array([caption_hash(text) if text else NO_HASH for _, text in sampled], pa.int64()),
    }
    return pa.table(columns).replace_schema_metadata({"bound": str(bound)})


@dataclass(frozen=True)
class RepeatedCaption:
    images: int  # of the sample
    text: str  # its beginning; "" of those after the first few


@dataclass(frozen=True)
class RepeatedCaptions:
    """Captions that are thrown out because they stand on too many images, by their hashes."""

    images: int  # in the sample
    sampled: float  # part of the data set's images that the sample is
    captions: dict[int, RepeatedCaption]  # the most repeated first

    @property
    def digest(self) -> str:
        """Names which captions they are, whatever their counts; "" where there are none."""
        return fingerprint(sorted(self.captions)) if self.captions else ""

    @property
    def share(self) -> float:
        """Of all images, those whose caption is one of them."""
        return sum(caption.images for caption in self.captions.values()) / max(self.images, 1)


NONE_REPEATED = RepeatedCaptions(0, 1.0, {})


def find_repeated(
    store: Store, captions: ManifestRef, max_share: float, report: ProgressCallback = ignore_progress
) -> RepeatedCaptions:
    """What stands recorded of a captions manifest and a share; counted and recorded where nothing does. One process calls it.

    Raises DataError where an index is gone or damaged.
    """
    if max_share >= 1:
        return NONE_REPEATED
    if (found := read_repeated(store, captions, max_share)) is not None:
        return found
    manifest = read_manifest(store, captions.folder, captions.digest)
    keys, hashes, bound = _read_sample(store, manifest, report)
    found = _repeated(store, manifest, hashes[keys < bound], bound / HASHES, max_share)
    listed = [
        {"hash": number, "images": caption.images, "text": caption.text} for number, caption in found.captions.items()
    ]
    about = {"captions": captions.digest, "max_share": max_share, "images": found.images, "sampled": found.sampled}
    store.put_json(_path(captions, max_share), sealed(about | {"repeated": listed}))
    return found


def read_repeated(store: Store, captions: ManifestRef, max_share: float) -> RepeatedCaptions | None:
    """None where nothing is recorded, or what is there is damaged: it is counted again."""
    if max_share >= 1:
        return NONE_REPEATED
    try:
        record = store.get_json(_path(captions, max_share))
    except (StoreNotFound, StoreDamaged):
        return None
    if not isinstance(record, dict) or record.get("sha256") != own_digest(record):
        return None
    listed = {entry["hash"]: RepeatedCaption(entry["images"], entry["text"]) for entry in record["repeated"]}
    return RepeatedCaptions(record["images"], record["sampled"], listed)


def _path(captions: ManifestRef, max_share: float) -> str:
    return f"{captions.folder}/{REPEATED_RECORD}{fingerprint([captions.digest, max_share])}.json"


def _read_sample(store: Store, manifest: Manifest, report: ProgressCallback) -> tuple[np.ndarray, np.ndarray, int]:
    """(hashes of keys, hashes of captions, bound): the sample of all shards. Those of an earlier, smaller data set have more of
    their rows, so each is thinned out as it comes.
    """
    bound = sample_bound(manifest.rows)
    parts: list[np.ndarray] = []  # (2, n)
    meter = ProgressMeter(len(manifest.shards), "shards", report)
    with ThreadPoolExecutor(INDEX_READERS, thread_name_prefix="repeated") as threads:
        for start in range(0, len(manifest.shards), SHARDS_READ_TOGETHER):
            if start:
                meter.update(start, "counting captions that stand on many images")
            entries = manifest.shards[start : start + SHARDS_READ_TOGETHER]
            for keys, hashes, own in threads.map(lambda entry: _index(store, manifest.folder, entry), entries):
                bound = min(bound, own)
                parts.append(np.stack([keys, hashes])[:, keys < bound])
    keys, hashes = np.concatenate([np.zeros((2, 0), np.int64), *parts], axis=1)
    return keys, hashes, bound


def _index(store: Store, folder: str, entry: ShardEntry) -> tuple[np.ndarray, np.ndarray, int]:
    """(hashes of keys, hashes of captions, bound) of one shard."""
    where = f"{store.uri(folder)}/{entry.stem}"
    try:
        index = read_shard_index(store, folder, entry.stem, entry.index_digest)
        return index["key_hash"].to_numpy(), index["caption_hash"].to_numpy(), int(index.schema.metadata[b"bound"])
    except StoreNotFound:
        raise DataError(f"{where}: its index is gone; delete its done record and run the caption stage again") from None
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: its index is not one of captions; delete its done record and run the caption stage again"
        ) from None


def _repeated(
    store: Store, manifest: Manifest, hashes: np.ndarray, sampled: float, max_share: float
) -> RepeatedCaptions:
    values, counts = np.unique(hashes[hashes != NO_HASH], return_counts=True)
    over = np.flatnonzero((counts > max_share * len(hashes)) & (counts >= REPEATED_AT_LEAST * sampled))
    order = over[np.lexsort((values[over], -counts[over]))]
    texts = _texts(store, manifest, [int(values[i]) for i in order[:TEXTS_SHOWN]])
    found = {int(values[i]): RepeatedCaption(int(counts[i]), texts.get(int(values[i]), "")) for i in order}
    return RepeatedCaptions(len(hashes), sampled, found)


def _texts(store: Store, manifest: Manifest, wanted: Sequence[int]) -> dict[int, str]:
    """The words of some captions, from the first shards: what stands everywhere stands there, too."""
    found: dict[int, str] = {}
    for entry in manifest.shards[: 2 * TEXTS_SHOWN]:
        if found.keys() >= set(wanted):
            break
        table: Any = read_table(store, manifest.folder, entry.stem, entry.digest)
        for caption in dict.fromkeys(table["caption"].to_pylist()):
            if caption and (number := caption_hash(caption)) in wanted:
                found[number] = shortened(caption, TEXT_CHARS)
    return found
