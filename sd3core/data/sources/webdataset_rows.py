"""Rows of a WebDataset tar: images and captions from the members of its samples.

Captions come from members such as `txt`, or from keys of the `json` member such as `json.caption`. What img2dataset says in a
row's status is believed, of the rows in the tar and of those that its table beside the tar has more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sd3core.data.caption_text import text_encoding
from sd3core.data.folder_listing import READABLE_SUFFIXES
from sd3core.data.sources.listing import SourceUnit
from sd3core.data.sources.ranged_file import RangedFile
from sd3core.data.sources.rows import IS_CUT, LONGEST_TEXT, RowNote, RowRules, SourceRow, status_problem
from sd3core.data.sources.tars import TarMember, TarReader, TarSample
from sd3core.data.store import Store, StoreDenied, StoreNotFound
from sd3core.errors import is_of_the_machine

# The first that has words is the caption, where the recipe names none.
CAPTION_MEMBERS = ("txt", "caption", "text", "json.caption", "json.captions", "json.text")
FIRST_TRIED = ("jpg", "jpeg", "png", "webp")
IMAGE_MEMBERS = (*FIRST_TRIED, *sorted({suffix[1:] for suffix in READABLE_SUFFIXES} - set(FIRST_TRIED)))
JSON = "json"
NOT_IN_TAR = "img2dataset's table has it, and the tar does not"


class WebdatasetRows:
    """Iterates over the rows of one tar. Afterwards `notes` has what is to be told of the file."""

    def __init__(self, rules: RowRules, unit: SourceUnit, store: Store) -> None:
        self.rules, self.unit, self.store = rules, unit, store
        data = rules.data
        self.image_fields = (data.image_field.lower().lstrip("."),) if data.image_field else IMAGE_MEMBERS
        self.caption_fields = data.caption_fields or CAPTION_MEMBERS
        self.takes_all = data.caption_fields is not None
        self.notes: dict[str, str] = {}  # what is told -> of which file, and where
        self.bytes_read = 0

    def __iter__(self) -> Iterator[SourceRow]:
        file, names = self.unit.file, set()
        with RangedFile(self.store, file.path, file.size, file.tag) as self.file:
            reader = TarReader(self.file)
            for sample in reader.samples():
                names.add(sample.key.rpartition("/")[2])
                row = self._row(sample)
                self.bytes_read = self.file.position
                yield row
            if reader.damage:
                self.notes[RowNote.DAMAGED] = f"{self.unit.name} ({reader.damage}, byte {reader.damage.place:,})"
                if not names:
                    yield SourceRow("", problem=f"a tar that is {reader.damage}")
            elif not reader.is_marked:
                self.notes[RowNote.UNMARKED] = self.unit.name
            if not names and not reader.damage:
                yield SourceRow("", problem="an empty tar")
            self.file.check()
        yield from self._rows_of_table(names)

    def _row(self, sample: TarSample) -> SourceRow:
        images = [sample.members[field] for field in self.image_fields if field in sample.members]
        described = self._json(sample)
        if sample.is_cut:
            return SourceRow(sample.key, problem=IS_CUT)
        if problem := status_problem((described or {}).get("status")):
            return SourceRow(sample.key, problem=problem)
        if not images:
            return SourceRow(sample.key, problem=self._no_image(sample))
        if problem := self.rules.too_large(images[0].size):
            return SourceRow(sample.key, problem=problem)
        image = self._read(images[0])  # before the texts only where the tar has it before them: ranges are kept
        try:
            texts = self._texts(sample, described or {})
        except UnicodeDecodeError:
            return SourceRow(sample.key, problem="its caption is not UTF-8; save it as UTF-8")
        notes = [RowNote.SEVERAL_IMAGES] if len(images) > 1 else []
        notes += [RowNote.BROKEN_JSON] if described is None else []
        return self.rules.row(sample.key, image, texts, self.caption_fields, notes)

    def _no_image(self, sample: TarSample) -> str:
        if self.rules.data.image_field:
            return f"no member .{self.image_fields[0]} (data.image_field)"
        if sample.members.keys() <= {"txt", "caption", "text", "json", "cls"}:
            return "words without an image: members of a sample must follow each other (tar --sort=name makes such)"
        return "no image among its members (data.image_field names one of another kind)"

    def _texts(self, sample: TarSample, described: dict[str, Any]) -> list[str]:
        found: list[str] = []
        for name in self.caption_fields:
            if name in sample.members:
                texts = [self._text(sample.members[name])]
            else:
                first, _, keys = name.partition(".")
                texts = _values(described, keys.split(".")) if first == JSON and keys else []
            found += texts
            if not self.takes_all and any(text.strip() for text in found):
                break
        return found

    def _text(self, member: TarMember) -> str:
        content = self._read(member) if member.size <= LONGEST_TEXT else b""
        encoding, skipped = text_encoding(content)
        return content[skipped:].decode(encoding)

    def _json(self, sample: TarSample) -> dict[str, Any] | None:
        """{} where there is none, None where it cannot be read."""
        member = sample.members.get(JSON)
        if member is None or sample.is_cut:
            return {}
        if member.size > LONGEST_TEXT:
            return None
        try:
            value = json.loads(self._read(member))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def _read(self, member: TarMember) -> bytes:
        self.file.seek(member.offset)
        return self.file.read(member.size)

    def _rows_of_table(self, names: set[str]) -> Iterator[SourceRow]:
        """Those that img2dataset has not brought into the tar, and those that were in it once."""
        table = self.unit.table
        if table is None:
            return
        try:
            with RangedFile(self.store, table.path, table.size, table.tag) as file:
                parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
                if not {"key", "status"} <= set(parquet.schema_arrow.names):
                    return
                rows = parquet.read(["key", "status"]).to_pylist()
        except (StoreNotFound, StoreDenied):
            self.notes[RowNote.NO_TABLE] = table.path
            return
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_of_the_machine(error):
                raise
            self.notes[RowNote.NO_TABLE] = table.path
            return
        for row in rows:
            if str(row["key"]) not in names:
                yield SourceRow(str(row["key"]), problem=status_problem(row["status"]) or NOT_IN_TAR)


def _values(value: Any, keys: list[str]) -> list[str]:
    """The words below nested keys: one string, or a list of them."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]
