"""Joins latents and text, row by row, and gathers rows into batches.

A row is read by the ranges of its latent and of the one caption that is wanted, each compared with its digest. What is
not trained on is not read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sd3core.data.batch_bytes import BatchBuffer, PackedBatch, PlainBuffer, StoredSample, pack_batch
from sd3core.data.encoded_shards import CAPTION_KINDS, ENCODE_AGAIN, ORIGINAL, SYNTHETIC, Split
from sd3core.data.manifest import Manifest
from sd3core.data.shard_cache import ShardCache, StoredRow
from sd3core.data.shard_rows import LATENT, ShardFiles, ShardRows, join_rows, joined_name
from sd3core.data.store import Store
from sd3core.data.uncaptioned import SPLITS, Uncaptioned, shards_without_captions, take_out_uncaptioned
from sd3core.data.unit_counts import UnitCounts, rows_in_manifest
from sd3core.errors import DataError
from sd3core.specs import TAR

INDEX_THREADS = 16
MAPPED_SHARDS = 1024  # tables of rows that a process has mapped: the files of a machine, not its memory
NAMED_SHARDS = 5  # shards that an error names
KEPT_SHARE = 0.75  # of the local cache that a data set may fill, to be kept in it whole


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """One shard's latents and text, as their manifests name them."""

    latents: ShardFiles
    text: ShardFiles


@dataclass(frozen=True, eq=False)
class CaptionDraws:
    """Which caption of each of n rows is wanted."""

    synthetic: np.ndarray  # (n,) bool: the kind, where the row has both
    which: np.ndarray  # (n,) in [0, 1): of several captions of that kind, each for an equal part; 0 is the first

    @staticmethod
    def first(rows: int) -> CaptionDraws:
        """Original captions, and of several the first."""
        return CaptionDraws(np.zeros(rows, dtype=bool), np.zeros(rows))


class ShardReader:
    """Reads rows of one data set. Shards line up by their numbers, and a shard stands at its `position` in the manifest.

    Raises DataError, naming the first few shards and how many there are, where the manifests do not line up or an index
    is not the one that its manifest names.
    """

    def __init__(
        self,
        store: Store,
        latents: Manifest,
        text: Manifest,
        cache: ShardCache,
        *,
        clip_tokens: int,
        t5_tokens: int,
        allocate: Callable[[int], BatchBuffer] = PlainBuffer,
    ) -> None:
        """`allocate`: bytes -> a buffer for a batch."""
        _check_line_up(latents, text, {"clip_tokens": clip_tokens, "t5_tokens": t5_tokens})
        self.store, self.cache = store, cache
        self._packing = {"clip_tokens": clip_tokens, "t5_tokens": t5_tokens, "allocate": allocate}
        self.latents_folder, self.text_folder = latents.folder, text.folder
        # The manifests themselves are let go of: their counts of 41 buckets take a kilobyte a shard as they stand there.
        texts = {shard.number: ShardFiles.of(shard) for shard in text.shards}
        self.shards = [EncodedShard(ShardFiles.of(shard), texts[shard.number]) for shard in latents.shards]
        self._rows = {split: rows_in_manifest(latents, split) for split in SPLITS}
        self._lacking = shards_without_captions(text)
        self.has_flips = "flip" in latents.fields
        self.row_bytes = latents.bytes / max(1, latents.rows) + text.bytes / max(1, text.rows)
        # A data set that this machine has room for is fetched once, and every epoch after the first reads the copy.
        self._keep = latents.bytes + text.bytes <= KEPT_SHARE * cache.max_bytes
        self._open: OrderedDict[int, ShardRows] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="indexes")

    def counts(self, split: Split = "train", uncaptioned: Uncaptioned | None = None) -> tuple[UnitCounts, int]:
        """Rows of the split that have a caption, and how many were left out for having none.

        The manifests say it, and `uncaptioned` where a shard has rows without a caption; None reads it from the indexes.
        """
        place_of = {shard.latents.number: place for place, shard in enumerate(self.shards)}
        if uncaptioned is None:
            opened = self.open(place_of[number] for number in self._lacking)
            uncaptioned = {self.shards[place].latents.number: rows.without_caption() for place, rows in opened.items()}
        return take_out_uncaptioned(self._rows[split], place_of, uncaptioned, split)

    def all_rows(self, split: Split) -> UnitCounts:
        """Rows of the split by shard and bucket, with a caption or without."""
        return UnitCounts(self._rows[split].rows.copy(), self._rows[split].buckets)

    def rows(self, position: int) -> ShardRows:
        """The rows of a shard; those of the shards used last stay mapped."""
        with self._lock:
            found = self._open.get(position)
            if found is not None:
                self._open.move_to_end(position)
                return found
        shard = self.shards[position]
        where = (shard.latents, self.latents_folder, shard.text, self.text_folder)
        table = self.cache.table(joined_name(shard.latents, shard.text), lambda: join_rows(self.store, *where))
        found = ShardRows(table)
        with self._lock:
            self._open[position] = found
            while len(self._open) > MAPPED_SHARDS:
                self._open.popitem(last=False)
        return found

    def open(self, positions: Iterable[int]) -> dict[int, ShardRows]:
        """The rows of several shards, fetched together. What is wrong with any of them is told in one line."""

        def rows_or_error(position: int) -> ShardRows | DataError:
            try:
                return self.rows(position)
            except DataError as error:
                return error

        wanted = sorted(set(positions))
        found = dict(zip(wanted, self._threads.map(rows_or_error, wanted), strict=True))
        errors = [str(error) for error in found.values() if isinstance(error, DataError)]
        if errors:
            more = f"; and {len(errors) - NAMED_SHARDS} more" if len(errors) > NAMED_SHARDS else ""
            raise DataError(
                f"{len(errors)} of {len(found)} shards cannot be trained on: {'; '.join(errors[:NAMED_SHARDS])}{more}"
            )
        return found

    def read_units(
        self,
        shards: np.ndarray,
        units: np.ndarray,
        bucket: str,
        draw_captions: Callable[[np.ndarray], CaptionDraws],
        split: Split = "train",
    ) -> list[StoredSample]:
        """The files of rows that are counted within their shard, bucket and split (n,), as a plan counts them.

        `draw_captions`: sample ids (n,) -> which captions are wanted.
        """
        opened = self.open(shards.tolist())
        rows = np.empty(len(shards), dtype=np.int64)
        for position, found in opened.items():
            chosen, wanted = found.of(bucket, split), np.flatnonzero(shards == position)
            if units[wanted].max() >= len(chosen):
                raise DataError(
                    f"{self.store.uri(self.latents_folder)}/{self.shards[position].latents.stem}: its index has"
                    f" {len(chosen)} rows of {bucket} px with a caption, its manifest more; {ENCODE_AGAIN}"
                )
            rows[wanted] = chosen[units[wanted]]
        pairs = zip(shards.tolist(), rows.tolist(), strict=True)
        ids = np.array([opened[position].sample_ids[row] for position, row in pairs], dtype=np.int64)
        return self._read(opened, shards, rows, draw_captions(ids))

    def _read(
        self, opened: dict[int, ShardRows], shards: np.ndarray, rows: np.ndarray, captions: CaptionDraws
    ) -> list[StoredSample]:
        """The files of rows of indexes (n,), with the captions wanted (n,); where a row has only one kind, it is taken."""
        stored, found = [], []
        drawn = zip(shards.tolist(), rows.tolist(), captions.synthetic.tolist(), captions.which.tolist(), strict=True)
        for position, row, wanted, which in drawn:
            shard, table = self.shards[position], opened[position]
            kind = table.caption_kind(row, SYNTHETIC if wanted else ORIGINAL)
            latents = f"{self.latents_folder}/{shard.latents.stem}{TAR}"
            text = f"{self.text_folder}/{shard.text.stem}{TAR}"
            stored.append(StoredRow(latents, shard.latents.digest, *table.place(row, LATENT)))
            stored.append(StoredRow(text, shard.text.digest, *table.place(row, kind, which)))
            found.append((table.keys[row].as_py(), int(table.sample_ids[row]), latents))
        files = self.cache.read(stored, keep=self._keep)
        return [
            StoredSample(latent, text, key, number, f"{where}: {key}")
            for latent, text, (key, number, where) in zip(files[::2], files[1::2], found, strict=True)
        ]

    def packed(
        self, samples: Sequence[StoredSample], epochs: np.ndarray, bucket: str, flipped: np.ndarray | None = None
    ) -> PackedBatch:
        """Rows of one bucket as a batch. flipped (B,) bool: as of `pack_batch`."""
        return pack_batch(samples, epochs, bucket, **self._packing, flipped=flipped)

    def originals(self, shards: np.ndarray, rows: np.ndarray, bucket: str) -> PackedBatch:
        """Rows of indexes, each with its first original caption, or the synthetic one where it has none; outside any epoch."""
        samples = self._read(self.open(shards.tolist()), shards, rows, CaptionDraws.first(len(rows)))
        return self.packed(samples, np.zeros(len(rows), dtype=np.int64), bucket)

    def find(self, wanted: Iterable[tuple[int, str]]) -> list[tuple[int, int, str]]:
        """(position of the shard, row, bucket) of samples by (shard number, key); those that have no caption or are not there
        are left out.
        """
        position_of = {shard.latents.number: position for position, shard in enumerate(self.shards)}
        found = []
        for number, key in wanted:
            if number in position_of:
                rows = self.rows(position_of[number])
                row = rows.keys.index(key).as_py()
                if row >= 0 and rows.caption_kind(row, CAPTION_KINDS[0]):
                    found.append((position_of[number], row, rows.bucket_of(row)))
        return found


def _check_line_up(latents: Manifest, text: Manifest, tokens: dict[str, int]) -> None:
    """Latents and text must be those, complete, and made from the same raw shards with the token counts asked for."""
    for manifest, stage in ((latents, "latents"), (text, "text")):
        if manifest.stage != stage:
            raise DataError(f"{manifest.folder}: a manifest of {manifest.stage}, where one of {stage} is needed")
    if latents.inputs.get("raw") != text.inputs.get("raw"):
        raise DataError(f"{latents.folder} and {text.folder} were made from different raw shards; {ENCODE_AGAIN}")
    for there, absent in ((latents, text), (text, latents)):
        missing = sorted({shard.number for shard in there.shards} - {shard.number for shard in absent.shards})
        if missing:
            lacking = set(missing)
            rows = sum(shard.rows for shard in there.shards if shard.number in lacking)
            raise DataError(
                f"{absent.folder}: no {absent.stage} for {rows} rows of {there.stage}, in shards {_first(missing)}"
                f" ({len(missing)} in all); {ENCODE_AGAIN}"
            )
    made_with = text.fields.get("text", {})
    for name, count in tokens.items():
        if made_with.get(name, count) != count:
            raise DataError(
                f"{text.folder}: encoded with text.{name} {made_with[name]}, {count} is asked for;"
                " run the encode stage again"
            )


def _first(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED_SHARDS])) + (", …" if len(numbers) > NAMED_SHARDS else "")
