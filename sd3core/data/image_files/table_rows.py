"""Reads rows of a jsonl or csv table, each at its own place in the file.

A row that is broken costs no other: a line that is no JSON, a quote that is not closed, cells without a column.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sd3core.data.caption_text import text_encoding
from sd3core.data.row_fields import CAPTION_FIELDS, IMAGE_FIELDS, RowFields, texts_of
from sd3core.errors import DataError, with_mend
from sd3core.recipe import Data
from sd3core.shown_text import printable, shortened

JSON_LINES = (".jsonl", ".ndjson")
DELIMITED = {".csv": (b",", b";", b"\t"), ".tsv": (b"\t",)}  # by what, the one that a header has most of
LONGEST_ROW_BYTES = 1_000_000
MOST_ROW_LINES = 100  # of a cell in quotes: behind a quote that is never closed there are other rows
SHOWN_ROW_CHARS = 80

NO_JSON = "not a JSON object"
NO_TEXT_OF_UTF8 = "not UTF-8; save the table as UTF-8"
TOO_LONG_ROW = f"longer than {LONGEST_ROW_BYTES:,} bytes"
CLOSED, OPEN, WRONG = "closed", "open", "wrong"  # quotes at a record's end
OPEN_QUOTE = "a quote in it is not closed; write two quotes for one within a quoted text"
MORE_CELLS = "more cells than columns; put a text with delimiters in quotes"
NO_CELLS = "not a row of a table"
NO_PATH = "no path of an image in it"
NO_TEXTS = "its captions are neither texts nor lists of texts"


class TableRow(NamedTuple):
    """A row's image and captions as they are written, or why it has none."""

    path: str = ""
    texts: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class TableFormat:
    """How a table is written, and which of its fields are read; `columns` and `delimiter` of a csv alone."""

    fields: RowFields
    columns: tuple[str, ...] = ()
    delimiter: bytes = b""

    def row(self, record: bytes) -> TableRow:
        """What a record says."""
        if len(record) > LONGEST_ROW_BYTES:
            return TableRow(problem=TOO_LONG_ROW)
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError:
            return TableRow(problem=NO_TEXT_OF_UTF8)
        row = self._cells(text) if self.delimiter else _json_object(text)
        if isinstance(row, str):
            return TableRow(problem=row)
        path, texts = row.get(self.fields.image), texts_of(row, self.fields.captions)
        if not isinstance(path, str) or not path.strip():
            return TableRow(problem=NO_PATH)
        return TableRow(problem=NO_TEXTS) if texts is None else TableRow(path.strip(), texts)

    def records(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of every record from here on; of one that is too long its first bytes."""
        place = file.tell()
        while line := file.readline(LONGEST_ROW_BYTES + 1):
            record, after = line, place + len(line)
            if len(line) > LONGEST_ROW_BYTES:
                after += _rest_of_line(file)
            elif self.delimiter and _quotes(line, self.delimiter) == OPEN:
                if whole := self._rest_of_record(file, line):
                    record, after = whole, place + len(whole)
                file.seek(after)
            if record.strip():
                yield place, record
            place = after

    def _rest_of_record(self, file: BinaryIO, begun: bytes) -> bytes:
        """The record that begins with a line whose quote is open; empty where it is not closed."""
        lines = [begun]
        room = LONGEST_ROW_BYTES - len(begun)
        while room > 0 and len(lines) < MOST_ROW_LINES and (line := file.readline(room)):
            lines.append(line)
            room -= len(line)
            # within quotes a line is as one that begins with them
            quotes = _quotes(b'"' + line, self.delimiter)
            if quotes != OPEN:
                return b"".join(lines) if quotes == CLOSED else b""
        return b""

    def _cells(self, text: str) -> dict[str, str] | str:
        if _quotes(text.encode(), self.delimiter) != CLOSED:
            return OPEN_QUOTE
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter.decode()), [])
        except csv.Error:
            return NO_CELLS
        if len(cells) > len(self.columns) and any(cells[len(self.columns) :]):
            return MORE_CELLS
        return dict(zip(self.columns, cells, strict=False))


def shown_record(record: bytes) -> str:
    """A record that cannot be used, by its beginning and end: its number would be another where a row is added."""
    return f"row {shortened(printable(record[:LONGEST_ROW_BYTES].decode('utf-8', 'replace').strip()), SHOWN_ROW_CHARS)}"


def read_format(file: BinaryIO, data: Data) -> TableFormat:
    """How the table at the beginning of `file` is written; leaves the file where its rows begin.

    Raises DataError of one line where it is no table, or has no such columns.
    """
    where, suffix = f"data.table {data.table}", Path(data.table or "").suffix.lower()
    if suffix not in (*JSON_LINES, *DELIMITED):
        mend = "unpack it" if suffix == ".gz" else "write a row a line as .jsonl, or a .csv or .tsv with a header"
        raise DataError(f"{where}: its rows cannot be read by their places; {mend}")
    encoding, begin = text_encoding(file.read(4096))
    if encoding != "utf-8":
        raise DataError(f"{where}: not UTF-8; save it as UTF-8")
    file.seek(begin)
    if suffix in JSON_LINES:
        return TableFormat(_fields_of(data, where, _first_keys(file, begin), strict=False))
    header = file.readline(LONGEST_ROW_BYTES)
    delimiter = max(DELIMITED[suffix], key=header.count)
    try:
        columns = next(csv.reader([header.decode("utf-8").strip("\r\n")], delimiter=delimiter.decode()), [])
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{where}: its first line is no header; write the columns' names there") from None
    columns = tuple(name.strip() for name in columns)
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are called {twice!r}; give each a name of its own")
    return TableFormat(_fields_of(data, where, columns, strict=True), columns, delimiter)


def _first_keys(file: BinaryIO, begin: int) -> tuple[str, ...]:
    """The keys of a jsonl's first object; leaves the file at `begin`."""
    keys: tuple[str, ...] = ()
    for _, record in TableFormat(RowFields()).records(file):
        row = _json_object(record.decode("utf-8", "replace"))
        if not isinstance(row, str):
            keys = tuple(row)
            break
    file.seek(begin)
    return keys


def _fields_of(data: Data, where: str, columns: Sequence[str], strict: bool) -> RowFields:
    """The recipe's names, else those that people use, in the order in which row_fields has them.

    `strict`: no row has others than `columns`.
    """
    named = [*([data.image_field] if data.image_field else []), *(data.caption_fields or ())]
    there = ", ".join(columns) or "none"
    if strict and (lacking := [name for name in named if name not in columns]):
        raise DataError(f"{where}: no column {lacking[0]!r}; its columns: {there}")
    image = data.image_field or next((name for name in IMAGE_FIELDS if name in columns), None)
    if image is None:
        raise DataError(f"{where}: no column of images is known by its name; name it in data.image_field: {there}")
    captions = [name for name in CAPTION_FIELDS if name in columns and name != image]
    return RowFields(image, data.caption_fields or tuple(captions[:1]))


def _json_object(text: str) -> dict | str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return NO_JSON
    return row if isinstance(row, dict) else NO_JSON


def _quotes(record: bytes, delimiter: bytes) -> str:
    """OPEN where the record ends within a cell in quotes, WRONG where such a cell goes on behind its quotes, else CLOSED.

    A quote within a cell without them is a character.
    """
    if b'"' not in record:
        return CLOSED
    between = re.escape(delimiter)
    begin, inside = b"(?:^|" + between + b')"', b'(?:[^"]|"")*+'
    rest = re.sub(begin + inside + b'"(?=' + between + rb"|\r?\n?\Z)", b"", record)
    if not (first := re.search(begin + inside, rest)):
        return CLOSED
    return OPEN if first.end() == len(rest) else WRONG


def _rest_of_line(file: BinaryIO) -> int:
    """Passes over the rest of a line; how many bytes it has."""
    passed = 0
    while part := file.readline(LONGEST_ROW_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def table_error(table: str, error: OSError) -> DataError:
    return DataError(f"data.table {table}: {with_mend(error)}")
