"""Makes raw shards of one tar or parquet file, in one pass over it.

A shard's rows wait on the local disk until all of them are there, for their content names the shard. What stands is not made
again: a run that was killed between two shards of a file reads the file from its start, and makes the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from sd3core.data.folder_source import storable
from sd3core.data.ingest import raw_sample
from sd3core.data.ingest_folder import FILES_SCHEMA, HELD_OUT_ROWS, stored_picture
from sd3core.data.shards import (
    IMAGE_DIGEST,
    DoneRecord,
    FailedRow,
    Sample,
    parts_digest,
    read_shard_done,
    shard_stem,
    short_digest,
    write_shard,
)
from sd3core.data.sources.listing import DENIED, SourceUnit
from sd3core.data.sources.parquet_rows import ParquetRows
from sd3core.data.sources.rows import RowRules, SourceRow, row_key
from sd3core.data.sources.seen_units import NoteFacts, SeenUnit, read_seen_unit, write_seen_unit
from sd3core.data.sources.unit_numbers import PARTS
from sd3core.data.sources.webdataset_rows import WebdatasetRows
from sd3core.data.store import Store, StoreDenied, StoreNotFound, open_store
from sd3core.errors import DataError, StoreError, with_mend
from sd3core.recipe import Data
from sd3core.specs import DONE
from sd3core.words import NAMED

SourceRows = WebdatasetRows | ParquetRows
VANISHED = "vanished since it was listed"


@dataclass(frozen=True)
class UnitShard:
    record: DoneRecord
    stood: bool  # it was made before


@dataclass(frozen=True)
class IngestedUnit:
    """What became of a source file."""

    shards: tuple[UnitShard, ...]
    seen: SeenUnit


@dataclass(frozen=True)
class _WaitingRow:
    """A row whose image waits on the local disk."""

    row: SourceRow  # without the image
    name: str  # in the whole source, for people
    key: str = ""
    sha256: str = ""
    offset: int = 0
    length: int = 0

    def content(self) -> tuple[str, ...]:
        """What names it in a shard's digest; of a problem that there is one, as for a folder's files."""
        told = self.key or self.name
        return told, self.sha256, json.dumps(self.row.captions), "left out" if self.row.problem else ""


@dataclass
class _Unit:
    """A file that is being read: what is known of it so far."""

    source: SourceUnit
    shards: list[UnitShard] = field(default_factory=list)
    rows: int = 0
    facts: NoteFacts = field(default_factory=dict)
    may_pass: bool = False  # something of it is to be looked at again
    names: Counter[str] = field(default_factory=Counter)  # of its rows

    def note(self, kind: str, name: str) -> None:
        count, names = self.facts.get(kind, (0, []))
        self.facts[kind] = (count + 1, [*names, name][:NAMED])


@dataclass
class UnitWorker:
    """SourceUnit -> raw shards. A row that cannot be used is a failed row of its shard, with the reason."""

    data: Data
    store_url: str
    folder: str
    captions_needed: bool
    rows: SourceRows | None = field(default=None, init=False)  # of the file that is being read
    stored: int = field(default=0, init=False)  # bytes of its images

    def __post_init__(self) -> None:
        self.store = open_store(self.store_url)
        self.rules = RowRules(self.data, self.captions_needed)
        self._sources: dict[str, Store] = {}

    @property
    def progress(self) -> int:
        """Megabytes of the file: each is read, then stored."""
        rows = self.rows
        return (rows.bytes_read + self.stored) // 2_000_000 if rows is not None else 0

    def __call__(self, unit: SourceUnit) -> IngestedUnit:
        """Raises SourceChanged where the file is not as it was listed, StoreError where its store cannot be reached."""
        if (standing := self._standing(unit)) is not None:
            return standing
        made, self.stored = _Unit(unit), 0
        self.rows = open_rows(self.rules, unit, self._source(unit.file.base)) if not unit.problem else None
        with tempfile.TemporaryFile(prefix="sd3-rows-") as scratch:
            waiting: list[_WaitingRow] = []
            for row in self._rows(made):
                if isinstance(row, int):  # a row group of so many rows begins: it stays whole where it can
                    if waiting and len(waiting) + row > self.data.rows_per_shard:
                        self._make(made, waiting, scratch)
                    continue
                waiting.append(_put(row, made, scratch))
                if len(waiting) == self.data.rows_per_shard:
                    self._make(made, waiting, scratch)
            if waiting or not made.shards:
                self._make(made, waiting, scratch)
        for kind, told in self.rows.notes.items() if self.rows is not None else ():
            made.note(kind, storable(told))
        version = unit.version if unit.at_rest and not made.may_pass else ""
        digests = tuple(shard.record.stem.partition(".")[2] for shard in made.shards)
        seen = SeenUnit(version, digests, made.rows, made.facts)
        write_seen_unit(self.store, self.folder, unit, seen)
        return IngestedUnit(tuple(made.shards), seen)

    def _standing(self, unit: SourceUnit) -> IngestedUnit | None:
        """All shards of a file that is as it was when they were made; None where one is to be made."""
        seen = read_seen_unit(self.store, self.folder, unit)
        if seen is None or seen.version != unit.version:
            return None
        try:
            records = [read_shard_done(self.store, self.folder, stem) for stem in seen.stems(unit.number)]
        except (DataError, StoreNotFound):
            return None
        return IngestedUnit(tuple(UnitShard(record, stood=True) for record in records), seen)

    def _source(self, base: str) -> Store:
        if base not in self._sources:
            self._sources[base] = open_store(base)
        return self._sources[base]

    def _rows(self, made: _Unit) -> Iterator[SourceRow | int]:
        """A file that is not there, or not to be read, is a row that says so."""
        if self.rows is None:
            yield SourceRow("", problem=made.source.problem)
            return
        try:
            yield from self.rows
        except StoreNotFound:
            yield SourceRow("", problem=VANISHED, may_pass=True)
        except StoreDenied:
            yield SourceRow("", problem=DENIED, may_pass=True)

    def _make(self, made: _Unit, waiting: list[_WaitingRow], scratch: BinaryIO) -> None:
        """Makes a shard of the rows that wait, unless it stands; then none waits."""
        if len(made.shards) == PARTS:
            raise DataError(
                f"{made.source.file.url}: it would become more than {PARTS:,} shards; raise data.rows_per_shard, or split it"
            )
        waiting.sort(key=lambda row: (row.key, row.name))
        number = made.source.number + len(made.shards)
        stem = shard_stem(number, parts_digest(*(text for row in waiting for text in row.content())))
        if stood := self.store.exists(f"{self.folder}/{stem}{DONE}"):
            record = read_shard_done(self.store, self.folder, stem)
        else:
            failed: list[FailedRow] = []
            counts: Counter[str] = Counter()
            samples = self._samples(waiting, scratch, failed, counts)
            record = write_shard(self.store, self.folder, stem, samples, failed, FILES_SCHEMA, counts=counts)
        made.shards.append(UnitShard(record, stood))
        waiting.clear()
        scratch.seek(0)
        scratch.truncate()

    def _samples(
        self, waiting: Sequence[_WaitingRow], scratch: BinaryIO, failed: list[FailedRow], counts: Counter[str]
    ) -> Iterator[Sample]:
        for row in waiting:
            try:
                if row.row.problem:
                    raise DataError(row.row.problem)
                scratch.seek(row.offset)
                picture, extension, stored = stored_picture(self.data, row.name, scratch.read(row.length))
                sample = raw_sample(
                    self.data, row.key, extension, stored, picture.image.size, row.row.captions, row.name
                )
                counts.update([*picture.notes, *([HELD_OUT_ROWS] if sample.row["split"] == "held_out" else [])])
                yield replace(sample, row=sample.row | {IMAGE_DIGEST: short_digest(stored)})
            except DataError as error:
                failed.append(FailedRow(key=row.name, reason=str(error)))
            self.stored += row.length


def open_rows(rules: RowRules, unit: SourceUnit, store: Store) -> SourceRows:
    """`store`: what the unit's file lies in; nothing is written to it."""
    return (WebdatasetRows if rules.data.source == "webdataset" else ParquetRows)(rules, unit, store)


def _put(row: SourceRow, made: _Unit, scratch: BinaryIO) -> _WaitingRow:
    """A row of the file is counted, and its image put on the local disk."""
    made.rows += 1
    made.may_pass |= row.may_pass
    name = storable(row.name or (short_digest(row.image) if row.image else ""))
    shown = f"{storable(made.source.name)}/{name}" if name else storable(made.source.name)
    for kind in row.notes:
        made.note(kind, shown)
    if row.problem:
        return _WaitingRow(replace(row, image=b""), shown)
    key = row_key(made.source.name, name, made.names[name])
    made.names[name] += 1
    try:
        offset = scratch.seek(0, os.SEEK_END)
        scratch.write(row.image)
    except OSError as error:
        raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {with_mend(error)}") from None
    digest = hashlib.sha256(row.image).hexdigest()
    return _WaitingRow(replace(row, image=b""), shown, key, digest, offset, len(row.image))
