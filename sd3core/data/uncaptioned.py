"""Counts the encoded rows that have no caption, so that a plan needs no index.

Latents and text are made apart, and only their indexes together say which latent has no text. Who makes latents reads them
once for each pair of manifests, and only of shards whose text says that it lacks some; every rank reads one record.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sd3core.data.encoded_shards import ENCODE_AGAIN, UNCAPTIONED, WITHOUT_CAPTION, Split
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.records import own_digest, sealed
from sd3core.data.shard_rows import ShardFiles, ShardRows, join_rows
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.data.unit_counts import UnitCounts
from sd3core.errors import DataError
from sd3core.specs import fingerprint

READING_THREADS = 16
SPLITS: tuple[Split, ...] = ("train", "held_out")

Uncaptioned = dict[int, dict[str, list[int]]]  # shard's number -> bucket -> rows of each of SPLITS, where there are any


def shards_without_captions(text: Manifest) -> set[int]:
    """The numbers of the shards where some row has no caption."""
    return {shard.number for shard in text.shards if shard.buckets.get(WITHOUT_CAPTION)}


def record_uncaptioned(store: Store, latents: ManifestRef, text: ManifestRef) -> None:
    """Writes the record of two manifests where one is needed and does not stand. One process calls it.

    Raises DataError where an index is gone or damaged.
    """
    texts = read_manifest(store, text.folder, text.digest)
    lacking = shards_without_captions(texts)
    if not lacking or _read(store, latents, text) is not None:
        return
    images = read_manifest(store, latents.folder, latents.digest)
    text_of = {shard.number: ShardFiles.of(shard) for shard in texts.shards}

    def count(number: int) -> dict[str, list[int]]:
        table = join_rows(store, latents_of[number], images.folder, text_of[number], texts.folder)
        return ShardRows(table).without_caption()

    latents_of = {shard.number: ShardFiles.of(shard) for shard in images.shards if shard.number in lacking}
    with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="captions") as threads:
        counts = dict(zip(latents_of, threads.map(count, latents_of), strict=True))
    rows = {str(number): found for number, found in counts.items() if found}
    store.put_json(_path(latents, text), sealed({"latents": latents.digest, "text": text.digest, "rows": rows}))


def read_uncaptioned(store: Store, latents: ManifestRef, text: ManifestRef) -> Uncaptioned:
    """What was recorded of two manifests. DataError where it is not there, or damaged."""
    rows = _read(store, latents, text)
    if rows is None:
        raise DataError(f"{store.uri(_path(latents, text))}: not there or damaged; {ENCODE_AGAIN}")
    return rows


def take_out_uncaptioned(
    counts: UnitCounts, place_of: dict[int, int], uncaptioned: Uncaptioned, split: Split
) -> tuple[UnitCounts, int]:
    """The counts of a split without the rows that have no caption, and how many those are.

    `place_of`: a shard's place in the counts, by its number.
    """
    rows, without = counts.rows.copy(), 0
    for number, found in uncaptioned.items():
        for bucket, lacking in found.items():
            missing = lacking[SPLITS.index(split)]
            rows[place_of[number], counts.buckets.index(bucket)] -= missing
            without += missing
    return UnitCounts(rows, counts.buckets), without


def _path(latents: ManifestRef, text: ManifestRef) -> str:
    return f"{latents.folder}/{UNCAPTIONED}{fingerprint([latents.digest, text.digest])}.json"


def _read(store: Store, latents: ManifestRef, text: ManifestRef) -> Uncaptioned | None:
    try:
        record = store.get_json(_path(latents, text))
    except (StoreNotFound, StoreDamaged):
        return None
    if not isinstance(record, dict) or record.get("sha256") != own_digest(record):
        return None
    return {int(number): counts for number, counts in record["rows"].items()}
