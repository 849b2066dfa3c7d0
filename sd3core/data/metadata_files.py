"""Reads metadata.jsonl, metadata.csv and metadata.tsv: a row an image."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3core.data.caption_text import text_encoding
from sd3core.data.image_names import ImageNames
from sd3core.data.row_fields import CAPTION_FIELDS, IMAGE_FIELDS, PLAIN_FIELDS, RowFields, texts_of
from sd3core.errors import DataError, with_mend
from sd3core.shown_text import printable, shortened
from sd3core.words import NAMED, counted, one_line, some

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
DELIMITERS = (",", ";", "\t")  # of a spreadsheet's countries
SHOWN_NAME_CHARS = 100  # of a row's file_name

NOT_JSON = "not a JSON object"
NO_FIELDS = "no {} in it"
NO_STRINGS = "{} must be strings, or lists of strings for captions"
NO_TEXT = "its {} is empty; write it there, or in NAME.txt beside the image"
NO_IMAGE = "its {} is no image of the folder; write the image's path from the metadata's folder on"
SEVERAL_IMAGES = "its {} fits several images; write it as the file is called"
TWICE = "an earlier row has given its image a caption; keep one of them"
NAME_ONLY = "an absolute path elsewhere, of which only the file's name is found here; look whether it is the same image"
SEVERAL_ROWS = "several rows, none spelled as the file is, fit one image; write {} as the file is called"


@dataclass
class Metadata:
    """What the metadata files say: words by image, where an image's text is empty, and the rows that were not used."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)  # image -> file and line
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """A row that names an image of the folder."""

    where: str
    name: str
    texts: tuple[str, ...]
    exact: bool
    by_file_name_only: bool


class _Told:
    """Rows that are told of: counted by reason, the first of each named."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str, detail: str = "") -> None:
        self.counts[reason] += 1
        if self.has_room(reason):
            self.names[reason].append(f"{name} ({detail})" if detail else name)

    def has_room(self, reason: str) -> bool:
        """Whether one more is named: what is costly to say is said of those alone."""
        return len(self.names[reason]) < NAMED

    def lines(self, what: str) -> list[str]:
        return [
            f"{counted(count, 'metadata row')} {what}: {reason}: {some(self.names[reason], count)}"
            for reason, count in sorted(self.counts.items(), key=lambda item: -item[1])
        ]


def read_metadata(root: Path, files: list[str], names: ImageNames, fields: RowFields = PLAIN_FIELDS) -> Metadata:
    """What the metadata files say of the images that `names` knows."""
    metadata, unused, guessed = Metadata(), _Told(), _Told()
    claims: dict[str, list[_Row]] = defaultdict(list)
    for file in files:
        try:
            rows = list(_rows_of(file, (root / file).read_bytes(), fields))
        except OSError as error:
            metadata.notes.append(f"{file}: cannot be read: {with_mend(error)}")
            continue
        except DataError as error:
            metadata.notes.append(f"{file}: {error}")
            continue
        for line, row in rows:
            _place_row(f"{file} line {line}", posixpath.dirname(file), row, fields, names, claims, metadata, unused)
    for image, rows in claims.items():
        exact = next((row for row in rows if row.exact), None)
        if exact is None and len({row.name for row in rows}) > 1:
            for row in rows:
                unused.add(SEVERAL_ROWS.format(fields.image), row.where, image)
            continue
        taken = exact or rows[0]
        metadata.captions[image] = taken.texts
        if taken.by_file_name_only:
            guessed.add(NAME_ONLY, taken.where, f"{_shown(taken.name)}: {image}")
        for row in rows:
            if row is not taken:
                unused.add(TWICE, row.where, image)
    metadata.notes += unused.lines("not used") + guessed.lines("used")
    return metadata


def _place_row(
    where: str,
    folder: str,
    row: Any,
    fields: RowFields,
    names: ImageNames,
    claims: dict[str, list[_Row]],
    metadata: Metadata,
    unused: _Told,
) -> None:
    """Puts a row's texts to its image, or its reason to the unused ones."""
    if reason := _unusable(row, fields):
        unused.add(reason, where)
        return
    name, texts = row[fields.image], texts_of(row, fields.captions) or ()
    found, exact, by_file_name_only = names.find(folder, name)
    shown = _shown(name)
    if not found:
        reason = NO_IMAGE.format(fields.image)
        unused.add(reason, where, names.with_nearest(shown, name) if unused.has_room(reason) else shown)
    elif len(found) > 1:
        unused.add(SEVERAL_IMAGES.format(fields.image), where, f"{shown}: {some(found, len(found))}")
    elif not any(map(one_line, texts)):
        metadata.empty.setdefault(found[0], where)
        unused.add(NO_TEXT.format(" or ".join(fields.captions)), where, shown)
    else:
        claims[found[0]].append(_Row(where, name, texts, exact, by_file_name_only))


def _unusable(row: Any, fields: RowFields) -> str:
    """Why a row cannot be used by its form alone, "" where it can. Columns under another name are named."""
    if not isinstance(row, dict):
        return NOT_JSON
    lacks_image, lacks_captions = fields.image not in row, not row.keys() & {*fields.captions}
    if lacks_image or lacks_captions:
        wanted = [("data.image_field", IMAGE_FIELDS)] * lacks_image + [
            ("data.caption_fields", CAPTION_FIELDS)
        ] * lacks_captions
        there = [(key, next((other for other in others if other in row), "")) for key, others in wanted]
        said = [f"{key}={other}" for key, other in there if other]
        return NO_FIELDS.format(fields.said) + (f"; set {' and '.join(said)}" if said else "")
    if not isinstance(row[fields.image], str) or texts_of(row, fields.captions) is None:
        return NO_STRINGS.format(fields.said)
    return ""


def _rows_of(file: str, content: bytes, fields: RowFields) -> Iterator[tuple[int, Any]]:
    """(line number, fields) of each row; None for what is no JSON."""
    encoding, skipped = text_encoding(content)
    if encoding == "utf-8" and file.lower().endswith(".jsonl"):
        lines = content[skipped:].split(b"\n")  # decoded one by one, so that a damaged one costs no other
    else:
        try:
            text = content[skipped:].decode(encoding)
        except UnicodeDecodeError:
            raise DataError("not UTF-8; save it as UTF-8") from None
        if not file.lower().endswith(".jsonl"):
            yield from _table_rows(text, fields)
            return
        lines = text.encode("utf-8", "surrogatepass").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                yield number, None


def _table_rows(text: str, fields: RowFields) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table whose first line names its columns, by the delimiter with which these are found there."""
    first = text.partition("\n")[0]
    delimiter = next(
        (d for d in DELIMITERS if {*fields.captions, fields.image} <= {*_columns(first, d)}), DELIMITERS[0]
    )
    columns = _columns(first, delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(reader, None)
        for row in filter(None, reader):
            yield reader.line_num, dict(zip(columns, row, strict=False))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}; mend the quotes there") from None


def _columns(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in line.strip("\r").split(delimiter)]


def _shown(name: str) -> str:
    return shortened(printable(name), SHOWN_NAME_CHARS)
