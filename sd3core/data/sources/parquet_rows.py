"""Rows of a parquet file: image bytes or paths, and columns of captions.

An image is a column of bytes, Hugging Face's struct of bytes and path, or a path: whole, s3://, or relative to the parquet file,
below whose folder it stays. Row groups are read one after another; one that cannot be read costs its rows and no others.
"""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from sd3core.data.sources.listing import DENIED, SourceUnit
from sd3core.data.sources.ranged_file import RangedFile
from sd3core.data.sources.rows import LONGEST_TEXT, RowNote, RowRules, SourceRow, status_problem
from sd3core.data.sources.urls import S3_URL
from sd3core.data.store import Store, StoreDenied, StoreNotFound, open_store
from sd3core.errors import DataError, StoreError, is_of_the_machine

# The first that is there, where the recipe names none.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes", "image_path", "file_name", "path")
CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "prompt")
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "uid")
STATUS = "status"  # of img2dataset
ROWS_AT_ONCE = 16
BUFFER_BYTES = 1 << 20  # of a column that is read: none is held whole
IMAGES_AHEAD = 8  # that rows name by path
EMPTY_PARQUET = "a parquet file without rows"
BROKEN_GROUP = "its row group cannot be read"


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: tuple[str, ...]
    key: str | None
    has_status: bool

    @property
    def names(self) -> list[str]:
        status = [STATUS] if self.has_status else []
        return list(dict.fromkeys([self.image, *self.captions, *([self.key] if self.key else []), *status]))


class ParquetRows:
    """Iterates over the rows of one file; a number goes between rows of two groups: how many rows the next has.

    Afterwards `notes` has what is to be told of the file.
    """

    def __init__(self, rules: RowRules, unit: SourceUnit, store: Store) -> None:
        self.rules, self.unit, self.store = rules, unit, store
        self.notes: dict[str, str] = {}
        self.bytes_read = 0
        self._stores: dict[str, Store] = {}

    def __iter__(self) -> Iterator[SourceRow | int]:
        file = self.unit.file
        with RangedFile(self.store, file.path, file.size, file.tag) as self.file:
            try:
                parquet = self._opened()
            except (pa.ArrowException, OSError, ValueError) as error:
                if is_of_the_machine(error):
                    raise
                yield SourceRow("", problem="a parquet file whose footer cannot be read")
                return
            if not parquet.metadata.num_rows:
                yield SourceRow("", problem=EMPTY_PARQUET)
            try:
                columns: _Columns | None = self.columns(parquet.schema_arrow)
            except DataError as error:
                columns, problem = None, str(error)
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                yield count
                if columns is None:
                    yield from (SourceRow(f"row {first + at}", problem=problem) for at in range(count))
                else:
                    yield from self._rows_of(parquet, group, first, count, columns)
                first += count
                self.bytes_read = file.size * first // max(1, parquet.metadata.num_rows)
            self.file.check()

    def _opened(self) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.PythonFile(self.file, mode="r"),
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def columns(self, schema: pa.Schema) -> _Columns:
        """Which columns are read. DataError where one that is needed is not there."""
        data, names = self.rules.data, schema.names
        wanted = (data.image_field,) if data.image_field else IMAGE_COLUMNS
        image = next((name for name in wanted if name in names), None)
        if image is None or not _may_be_image(schema.field(image).type):
            what = (
                f"no column {' or '.join(wanted)}" if image is None else f"column {image} is {schema.field(image).type}"
            )
            raise DataError(f"{what}, for image bytes or paths (data.image_field); it has {', '.join(names)}")
        if data.caption_fields:
            if missing := [name for name in data.caption_fields if name.partition(".")[0] not in names]:
                raise DataError(f"no column {', '.join(missing)} (data.caption_fields); it has {', '.join(names)}")
            captions = tuple(dict.fromkeys(name.partition(".")[0] for name in data.caption_fields))
        else:
            captions = tuple(name for name in CAPTION_COLUMNS if name in names)[:1]
        key = next((name for name in KEY_COLUMNS if name in names and _is_key(schema.field(name).type)), None)
        return _Columns(image, captions, key, STATUS in names)

    def _rows_of(
        self, parquet: pq.ParquetFile, group: int, first: int, count: int, columns: _Columns
    ) -> Iterator[SourceRow]:
        """Of one row group. What is not read of one that is damaged is as many rows as its footer says."""
        read = 0
        try:
            batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns.names)
            places = (row for batch in batches for row in batch.to_pylist())
            for row in self._with_images(places, columns):
                read += 1
                self.bytes_read = self.unit.file.size * (first + read) // parquet.metadata.num_rows
                yield self._row(row, first + read - 1, columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_of_the_machine(error):
                raise
            self.notes[RowNote.DAMAGED] = f"{self.unit.name} (row group {group})"
        yield from (SourceRow(f"row {first + at}", problem=BROKEN_GROUP) for at in range(read, count))

    def _with_images(self, rows: Iterable[dict[str, Any]], columns: _Columns) -> Iterator[dict[str, Any]]:
        """Rows in order; images that they name by path are fetched ahead."""
        waiting: deque[tuple[dict[str, Any], Future[_Image]]] = deque()
        with ThreadPoolExecutor(IMAGES_AHEAD) as threads:
            for row in rows:
                waiting.append((row, threads.submit(self._image, row[columns.image])))
                if len(waiting) > IMAGES_AHEAD:
                    row, image = waiting.popleft()
                    yield row | {columns.image: image.result()}
            for row, image in waiting:
                yield row | {columns.image: image.result()}

    def _row(self, row: dict[str, Any], number: int, columns: _Columns) -> SourceRow:
        image: _Image = row[columns.image]
        name = str(row[columns.key]) if columns.key and row[columns.key] not in (None, "") else image.name
        if columns.has_status and (problem := status_problem(row[STATUS])):
            return SourceRow(name or f"row {number}", problem=problem)
        if image.problem:
            return SourceRow(name or f"row {number}", problem=image.problem, may_pass=image.may_pass)
        fields = self.rules.data.caption_fields or columns.captions
        texts = [text for field in fields for text in _texts(row, field.split("."))]
        return self.rules.row(
            name, image.data, [text for text in texts if len(text) <= LONGEST_TEXT], fields or CAPTION_COLUMNS
        )

    def _image(self, value: Any) -> _Image:
        """`value`: of the image column, which is bytes, a path, or a struct of both."""
        path = ""
        if isinstance(value, dict):
            path = value.get("path") or ""
            value = value.get("bytes") or path
        if value is None or value in ("", b""):
            return _Image(path, problem="no image in its row")
        if isinstance(value, str):
            return self._at(value)
        return _Image(path, value, self.rules.too_large(len(value)))

    def _at(self, path: str) -> _Image:
        """The image that a row names."""
        try:
            if path.startswith(S3_URL):
                bucket, _, name = path.removeprefix(S3_URL).partition("/")
                store = self._store(S3_URL + bucket)
            elif path.startswith("/"):
                store, name = self._store("/"), path[1:]
            elif "://" in path:
                return _Image(path, problem="its path is a URL that is not read (s3:// is)")
            else:
                store, name = (
                    self.store,
                    posixpath.join(posixpath.dirname(self.unit.file.path), path.removeprefix("./")),
                )
            if problem := self.rules.too_large(store.size(name)):
                return _Image(path, problem=problem)
            return _Image(path, store.get(name))
        except StoreNotFound:
            return _Image(path, problem="its path names no file", may_pass=True)
        except StoreDenied:
            return _Image(path, problem=DENIED, may_pass=True)
        except StoreError as error:
            if "stay inside the store" in str(error):
                return _Image(path, problem="its path leads out of the parquet file's folder")
            raise

    def _store(self, base: str) -> Store:
        if base not in self._stores:
            self._stores[base] = open_store(base)
        return self._stores[base]


@dataclass(frozen=True)
class _Image:
    name: str
    data: bytes = b""
    problem: str = ""
    may_pass: bool = False


def _texts(row: dict[str, Any], keys: list[str]) -> list[str]:
    """The words of a column, or below keys of a struct: one string, or a list of them."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _may_be_image(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        return {"bytes", "path"} & {kind.field(at).name for at in range(kind.num_fields)} != set()
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_string(kind) or pt.is_large_string(kind)


def _is_key(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_integer(kind)
