"""The rows of one encoded shard: where each one's latent and captions lie.

They are joined from two indexes, once on a machine, into an Arrow file that all its processes map into their memory: a
rank holds no table of its own, however many rows there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd3core.data.encoded_shards import CAPTION_KINDS, ENCODE_AGAIN, FILE_DIGEST, Split
from sd3core.data.manifest import ShardEntry
from sd3core.data.shards import read_shard_index, sample_id
from sd3core.data.store import Store, StoreNotFound
from sd3core.errors import DataError

JOIN = 1  # raise it when the joined table changes: files of before are not read
LATENT = "latent"
PLACE = ("offset", "length", "sha256")  # columns of both indexes
FILES = (LATENT, *CAPTION_KINDS)  # what a row may have: -1 as its offset says that it has not


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """What a manifest says of a shard's files: all that is kept of it, for all shards at once."""

    number: int
    stem: str
    rows: int
    digest: str
    index_digest: str | None

    @staticmethod
    def of(entry: ShardEntry) -> ShardFiles:
        return ShardFiles(entry.number, entry.stem, entry.rows, entry.digest, entry.index_digest)


class ShardRows:
    """One shard's rows, in the order of the latents' index, each with the place and the SHA-256 of its files."""

    def __init__(self, table: pa.Table) -> None:
        self.keys = table["key"].combine_chunks()
        self.sample_ids = table["sample_id"].to_numpy()
        self.buckets: list[str] = table.schema.metadata[b"buckets"].decode().split()
        self._bucket = table["bucket"].to_numpy()
        self._held_out = table["held_out"].to_numpy()
        self._offset = {name: table[f"{name}_offset"].to_numpy() for name in FILES}
        self._length = {name: table[f"{name}_length"].to_numpy() for name in FILES}
        self._digest = {name: table[f"{name}_sha256"].combine_chunks() for name in FILES}
        further = {name: _further(name) for name in CAPTION_KINDS}
        self._further = {
            name: table[column].combine_chunks() for name, column in further.items() if column in table.column_names
        }
        self._chosen = lru_cache(maxsize=64)(self._choose)

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, bucket: str, split: Split) -> np.ndarray:
        """The rows of a bucket and split that have a caption, in order."""
        return self._chosen(bucket, split)

    def _choose(self, bucket: str, split: Split) -> np.ndarray:
        if bucket not in self.buckets:
            return np.zeros(0, dtype=np.int64)
        captioned = np.any([self._offset[kind] >= 0 for kind in CAPTION_KINDS], axis=0)
        wanted = (self._bucket == self.buckets.index(bucket)) & (self._held_out == (split == "held_out"))
        return np.flatnonzero(wanted & captioned)

    def without_caption(self) -> dict[str, list[int]]:
        """By bucket how many rows to train on and how many held-out ones have none, where there are any."""
        found = {}
        for code, bucket in enumerate(self.buckets):
            whole = np.bincount(self._held_out[self._bucket == code], minlength=2)
            lacking = [int(whole[0]) - len(self.of(bucket, "train")), int(whole[1]) - len(self.of(bucket, "held_out"))]
            found |= {bucket: lacking} if any(lacking) else {}
        return found

    def bucket_of(self, row: int) -> str:
        return self.buckets[self._bucket[row]]

    def caption_kind(self, row: int, wanted: str) -> str | None:
        """The kind wanted where the row has it, else the other, else None."""
        for kind in (wanted, *CAPTION_KINDS):
            if self._offset[kind][row] >= 0:
                return kind
        return None

    def place(self, row: int, file: str, drawn: float = 0.0) -> tuple[int, int, bytes]:
        """(offset in its tar, length with the header, SHA-256 of the file).

        Of several captions of a kind the number `drawn` in [0, 1) takes one, each for an equal part of it; 0 is the first.
        """
        if drawn and file in self._further:
            further = self._further[file][row]
            if number := int(drawn * (1 + len(further))):
                return tuple(further[number - 1].as_py().values())
        return int(self._offset[file][row]), int(self._length[file][row]), self._digest[file][row].as_py()


def joined_name(latents: ShardFiles, text: ShardFiles) -> str:
    """The name of the joined table on this machine: it says which indexes it was made from."""
    digests = f"{JOIN}/{latents.index_digest}/{text.index_digest}"
    return f"rows-{hashlib.sha256(digests.encode()).hexdigest()[:32]}"


def join_rows(store: Store, latents: ShardFiles, latents_folder: str, text: ShardFiles, text_folder: str) -> pa.Table:
    """Reads and joins the indexes of a shard. DataError where one is gone, damaged, or of an earlier version."""
    rows = _read_checked_index(store, latents_folder, latents)
    captions = _read_checked_index(store, text_folder, text)
    buckets = rows["bucket"].combine_chunks().dictionary_encode()
    columns = {
        "key": rows["key"].combine_chunks(),
        "sample_id": pa.array([sample_id(key) for key in rows["key"].to_pylist()], pa.int64()),
        "bucket": buckets.indices.cast(pa.int32()),
        "held_out": pc.equal(rows["split"], "held_out").combine_chunks().cast(pa.uint8()),
    }
    columns |= {f"{LATENT}_{name}": rows[name].combine_chunks() for name in PLACE}
    row_of_caption = pc.index_in(captions["key"], value_set=columns["key"])  # none: its image could not be encoded
    for kind in CAPTION_KINDS:
        used = pc.and_(pc.equal(captions["kind"], kind), pc.is_valid(row_of_caption))
        row, found = row_of_caption.filter(used).to_numpy(), captions.filter(used)
        if "place" in found.column_names:
            order = np.lexsort((found["place"].fill_null(0).to_numpy(), row))
            row, found = row[order], found.take(order)
        have, first = np.unique(row, return_index=True)
        caption_of_row = np.full(len(rows), -1)
        caption_of_row[have] = first
        chosen = pa.array(caption_of_row, mask=caption_of_row < 0)
        absent = {"offset": -1, "length": 0, "sha256": bytes(32)}
        for name in PLACE:
            filled = found[name].combine_chunks().take(chosen).fill_null(pa.scalar(absent[name], found[name].type))
            columns[f"{kind}_{name}"] = filled
        if len(have) < len(row):
            columns[_further(kind)] = _rest(found.select(PLACE), row, first, len(rows))
    return pa.table(columns).replace_schema_metadata({"buckets": " ".join(buckets.dictionary.to_pylist())})


def _further(kind: str) -> str:
    """The column of a row's captions of a kind after the first; a shard where no row has several has none."""
    return f"{kind}_further"


def _rest(captions: pa.Table, row: np.ndarray, first: np.ndarray, rows: int) -> pa.ListArray:
    """All but the `first` caption of each row, by rows; `row`: whose each caption is, in order."""
    rest = np.delete(np.arange(len(row)), first)
    ends = np.searchsorted(row[rest], np.arange(rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(ends, captions.take(rest).combine_chunks().to_struct_array().combine_chunks())


def _read_checked_index(store: Store, folder: str, shard: ShardFiles) -> pa.Table:
    where = f"{store.uri(folder)}/{shard.stem}"
    try:
        index = read_shard_index(store, folder, shard.stem, shard.index_digest)
    except StoreNotFound:
        raise DataError(f"{where}: its index is gone; delete its done record and run the stage again") from None
    if index.num_rows != shard.rows:
        raise DataError(f"{where}: its index has {index.num_rows} rows, its manifest {shard.rows}; run the stage again")
    if FILE_DIGEST[0] not in index.column_names:
        raise DataError(f"{where}: its index is of an earlier version; {ENCODE_AGAIN}")
    return index
