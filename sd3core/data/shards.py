"""One shard: a WebDataset tar, an index beside it, and the done record.

The record is written last. Nothing without its done record exists: a killed writer costs its shard and leaves nothing that a reader sees. The bytes
are a function of the samples alone (no times, no owners), so a shard that is made again has the same digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from sd3core.data.records import sha256_of
from sd3core.data.store import Store, canonical_json
from sd3core.errors import DataError, StoreError
from sd3core.specs import DONE, INDEX, TABLE, TAR

TAR_BLOCK = tarfile.BLOCKSIZE
IMAGE_EXTENSIONS = ("jpg", "png", "webp")  # of the image in a raw sample
OPTIONAL = {b"optional": b"1"}
IMAGE_DIGEST = "image_digest"  # index column: the short digest of the stored image that a row is, or was made from


class FailedRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str
    reason: str


class DoneRecord(BaseModel):
    """What a finished shard is: rows made, rows that failed and why, bytes, SHA-256 by file suffix."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    stem: str
    rows: int
    failed: list[FailedRow]
    bytes: int
    files: dict[str, str]  # suffix -> sha256
    digest: str  # sha256 of the main file (the tar, or the table)
    extra: dict[str, int] = {}  # rows per bucket, and what else a stage counts


@dataclass(frozen=True)
class Sample:
    """One row of a shard. `files`: extension -> bytes. `row`: what the index knows besides key, offset and length."""

    key: str
    files: dict[str, bytes]
    row: dict[str, Any] = field(default_factory=dict)


def shard_stem(number: int, digest: str) -> str:
    """`00042.0123456789ab`: the shard's number, and 12 hex digits that name the content of the input shard."""
    return f"{number:05d}.{digest[:12]}"


def shard_number(stem: str) -> int:
    return int(stem.partition(".")[0])


def parts_digest(*parts: str | bytes) -> str:
    """12 hex digits that name content: each part is hashed with its length, so that parts cannot run together."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()[:12]


def short_digest(data: bytes) -> str:
    """128 bits of the SHA-256, in hex digits: for columns of many rows."""
    return hashlib.sha256(data).hexdigest()[:32]


def sample_id(key: str) -> int:
    """A 63-bit number of the key, stable for ever: the counter of counter-based randomness."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") & (2**63 - 1)


def is_held_out(key: str, fraction: float) -> bool:
    """Is this key in the part that training never sees? A function of the key alone, so a growing data set moves
    nothing.
    """
    draw = int.from_bytes(hashlib.sha256(b"held out:" + key.encode()).digest()[:8], "big") / 2**64
    return draw < fraction


def write_shard(
    store: Store,
    folder: str,
    stem: str,
    samples: Iterable[Sample],
    failed: list[FailedRow],
    schema: pa.Schema | None = None,
    count_by: str | None = None,
    counts: dict[str, int] | None = None,
) -> DoneRecord:
    """Writes FOLDER/STEM.tar, STEM.index.parquet, then STEM.done.json.

    `samples` may append to `failed`, and count in `counts`, while it is iterated. `schema` fixes the index's own columns
    (needed where a shard can be empty; `optional_column`s only where they are used). The record's `extra`: `counts`, and of the index column `count_by` how often each
    value stands there. A sample without files is an index row only; its `row` says where its bytes are.
    """
    rows: list[dict[str, Any]] = []
    written: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="sd3-shard-") as scratch:
        local = Path(scratch, "shard.tar")
        with local.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                offset = tar.offset
                _check_key(sample, written)
                for extension, data in sample.files.items():
                    _add(tar, f"{sample.key}.{extension}", data)
                rows.append({"key": sample.key, "offset": offset, "length": tar.offset - offset, **sample.row})
        digest, size = sha256_of(local), local.stat().st_size
        store.put_file(f"{folder}/{stem}{TAR}", local)
    index = _parquet_bytes(_index_table(rows, schema))
    store.put(f"{folder}/{stem}{INDEX}", index)
    files = {TAR: digest, INDEX: hashlib.sha256(index).hexdigest()}
    extra = {**(counts or {}), **(_count(rows, count_by) if count_by else {})}
    return _finish(store, folder, stem, len(rows), failed, size + len(index), files, digest, extra)


def write_table(
    store: Store,
    folder: str,
    stem: str,
    table: pa.Table,
    failed: list[FailedRow],
    index: pa.Table | None = None,
    counts: dict[str, int] | None = None,
) -> DoneRecord:
    """Writes FOLDER/STEM.parquet, STEM.index.parquet where there is one, then the done record: a shard that is rows without files
    (captions). `counts`: the record's `extra`.
    """
    data = _parquet_bytes(table)
    store.put(f"{folder}/{stem}{TABLE}", data)
    digest = hashlib.sha256(data).hexdigest()
    size, files = len(data), {TABLE: digest}
    if index is not None:
        beside = _parquet_bytes(index)
        store.put(f"{folder}/{stem}{INDEX}", beside)
        size, files[INDEX] = size + len(beside), hashlib.sha256(beside).hexdigest()
    return _finish(store, folder, stem, table.num_rows, failed, size, files, digest, counts or {})


def finished_stems(store: Store, folder: str) -> dict[str, float]:
    """The shards that are done, and when their records were written, from one listing."""
    return {
        name.removesuffix(DONE): entry.modified
        for entry in store.list(folder)
        if "/" not in (name := entry.path[len(folder) + 1 :]) and name.endswith(DONE)
    }


def read_shard_done(store: Store, folder: str, stem: str) -> DoneRecord:
    path = f"{folder}/{stem}{DONE}"
    try:
        return DoneRecord.model_validate(store.get_json(path))
    except ValueError:
        raise DataError(
            f"{store.uri(path)}: not a done record of this version; delete it and run the stage again"
        ) from None


def read_shard_index(store: Store, folder: str, stem: str, digest: str | None = None) -> pa.Table:
    """A shard's index, after its SHA-256 is checked against `digest` where one is given."""
    return _read_parquet(store, f"{folder}/{stem}{INDEX}", digest)


def read_table(store: Store, folder: str, stem: str, digest: str | None = None) -> pa.Table:
    return _read_parquet(store, f"{folder}/{stem}{TABLE}", digest)


def check_digest(data: bytes, digest: str, uri: str) -> None:
    """Raises DataError unless these are the bytes that a manifest names."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise not_of_its_manifest(uri)


def not_of_its_manifest(uri: str) -> DataError:
    """A damaged tar, index or table of a shard, and the mend."""
    stem = uri.rpartition("/")[2].removesuffix(TAR).removesuffix(INDEX).removesuffix(TABLE)
    return DataError(
        f"{uri}: its bytes are not those of its manifest; delete {stem}{DONE} beside it and run the stage again"
    )


def read_samples(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample of a whole tar: key, and bytes by extension. The key ends at the first dot of the name."""
    key, files = None, {}
    for name, content in _members(data):
        stem, _, extension = name.partition(".")
        if stem != key:
            if key is not None:
                yield key, files
            key, files = stem, {}
        files[extension] = content
    if key is not None:
        yield key, files


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if len(content) != member.size:
                    raise DataError(f"tar: ends in the middle of {member.name}; make its shard again")
                yield member.name, content
    except tarfile.TarError as error:
        raise DataError(f"tar: {error}; make its shard again") from None


def read_raw_samples(
    store: Store, folder: str, stem: str, digest: str | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a stored tar, after its SHA-256 is checked against `digest`."""
    path = f"{folder}/{stem}{TAR}"
    data = store.get(path)
    if digest is not None:
        check_digest(data, digest, store.uri(path))
    yield from read_samples(data)


def image_of(files: dict[str, bytes], where: str) -> bytes:
    """The encoded image of a raw sample. Raises DataError naming `where` if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in files:
            return files[extension]
    raise DataError(f"{where} has no {' or '.join(IMAGE_EXTENSIONS)}")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 644
    member.size = len(data)
    try:
        tar.addfile(member, io.BytesIO(data))
    except OSError as error:
        raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None


def _check_key(sample: Sample, written: set[str]) -> None:
    """Readers take a key up to the first dot, and neighbours of one key as one sample."""
    if not sample.files:
        return
    if not sample.key or set("./\\") & set(sample.key) or sample.key in written:
        raise ValueError(f"sample key {sample.key!r}: a key is used once in a shard, and has no dot and no slash")
    written.add(sample.key)


INDEX_COLUMNS = [("key", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]


def optional_column(name: str, kind: pa.DataType) -> pa.Field:
    """A column of a schema that stands in a shard's index only where a row has a value: all other shards keep their bytes."""
    return pa.field(name, kind, metadata=OPTIONAL)


def _index_table(rows: list[dict[str, Any]], schema: pa.Schema | None) -> pa.Table:
    if schema is not None:
        own = (
            column.remove_metadata()
            for column in schema
            if column.metadata != OPTIONAL or any(row.get(column.name) is not None for row in rows)
        )
        return pa.Table.from_pylist(rows, schema=pa.schema([*INDEX_COLUMNS, *own]))
    return pa.Table.from_pylist(rows) if rows else pa.schema(INDEX_COLUMNS).empty_table()


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _read_parquet(store: Store, path: str, digest: str | None) -> pa.Table:
    data = store.get(path)
    if digest is not None:
        check_digest(data, digest, store.uri(path))
    try:
        return pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{store.uri(path)}: not a parquet file; delete the shard's done record and run the stage again"
        ) from None


def _count(rows: list[dict[str, Any]], column: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column]] = counts.get(row[column], 0) + 1
    return dict(sorted(counts.items()))


def _finish(
    store: Store,
    folder: str,
    stem: str,
    rows: int,
    failed: list[FailedRow],
    size: int,
    files: dict[str, str],
    digest: str,
    extra: dict[str, int],
) -> DoneRecord:
    record = DoneRecord(
        number=shard_number(stem),
        stem=stem,
        rows=rows,
        failed=list(failed),
        bytes=size,
        files=files,
        digest=digest,
        extra=extra,
    )
    store.put(f"{folder}/{stem}{DONE}", canonical_json(json.loads(record.model_dump_json())))
    return record
