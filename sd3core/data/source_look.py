"""Looks at a source before it is ingested: its rows, their sizes and captions.

A listing, and some hundreds of rows, chosen by hash so that the choice does not follow the order of the data, and read as the
ingest stage reads them. Nothing is written.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from sd3core.data.folder_captions import ListedImage
from sd3core.data.folder_source import FolderSlice, read_item, storable
from sd3core.data.image_files.listed_table import TableSlice, list_files
from sd3core.data.ingest_folder import stored_picture, usable_image
from sd3core.data.sources.ingest_unit import open_rows
from sd3core.data.sources.listing import SourceUnit, list_source
from sd3core.data.sources.rows import RowRules, SourceRow
from sd3core.data.store import StoreDenied, StoreNotFound, open_store
from sd3core.errors import DataError
from sd3core.progress import Progress, ProgressCallback, ignore_progress
from sd3core.recipe import UNIT_SOURCES, Data

ROWS_SAMPLED = 500  # that are read, at most
UNITS_SAMPLED = 5  # tars or parquet files that they are taken from, at most


@dataclass
class SourceLook:
    """What was seen. `rows`: of the whole source; an estimate where `is_estimate`, as all shares are where `looked` is less."""

    rows: int = 0
    is_estimate: bool = False
    files: int = 0  # tars or parquet files; 0 where each image is a file
    looked: int = 0  # rows that were read
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of those that can be used
    bytes: int = 0  # of their image files
    captions: list[tuple[str, ...]] = field(default_factory=list)  # theirs
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    notes: list[str] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """How many rows of the whole source can be used."""
        return round(self.rows * len(self.sizes) / self.looked) if self.looked else 0

    @property
    def words(self) -> np.ndarray:
        """Words of each caption (n,)."""
        return np.array([len(caption.split()) for captions in self.captions for caption in captions], dtype=np.int64)

    @contextmanager
    def of_row(self, report: ProgressCallback, most: int) -> Iterator[None]:
        """Counts a row of `most` that is read inside, and its reason where it is of no use."""
        self.looked += 1
        try:
            yield
        except DataError as error:
            self.left_out[str(error)] += 1
        report(Progress(self.looked, most, "rows"))

    def take(self, size: tuple[int, int], image: int, captions: tuple[str, ...]) -> None:
        self.sizes.append(size)
        self.bytes += image
        self.captions.append(captions)


def look_at_source(
    data: Data, captions_needed: bool, report: ProgressCallback = ignore_progress, *, rows: int = ROWS_SAMPLED
) -> SourceLook:
    """`captions_needed`: an image without a caption is of no use. Raises as the ingest stage does of a source that cannot be listed."""
    if data.source in UNIT_SOURCES:
        return _look_at_units(data, captions_needed, report, rows)
    return _look_at_files(data, captions_needed, report, rows)


def _look_at_files(data: Data, captions_needed: bool, report: ProgressCallback, rows: int) -> SourceLook:
    source = list_files(data)
    slices = sorted(source.slices(), key=lambda part: _order(str(part.number)))  # each is of all the source, by a hash
    look = SourceLook(rows=sum(part.rows for part in slices), notes=source.notes())
    for root, image in islice(_by_hash(slices), rows):
        item = read_item(root, image, data, captions_needed)
        look.looked += image.rows - 1  # of a table, which only add captions
        with look.of_row(report, rows):
            picture, _, stored = usable_image(data, root, item)
            look.take(picture.image.size, len(stored), item.captions)
    return look


def _by_hash(slices: Iterable[FolderSlice | TableSlice]) -> Iterator[tuple[Path, ListedImage]]:
    for part in slices:
        yield from ((Path(part.root), image) for image in sorted(part.images(), key=lambda i: _order(i.file.path)))


def _look_at_units(data: Data, captions_needed: bool, report: ProgressCallback, rows: int) -> SourceLook:
    rules, listing = RowRules(data, captions_needed), list_source(data)
    look = SourceLook(files=len(listing.units), notes=list(listing.notes))
    chosen = sorted(listing.units, key=lambda unit: _order(unit.name))[:UNITS_SAMPLED]
    read = 0
    for place, unit in enumerate(chosen):
        of_unit = _UnitRows(rules, unit, -(-(rows - look.looked) // (len(chosen) - place)))
        for row in of_unit:
            with look.of_row(report, rows):
                if row.problem:
                    raise DataError(row.problem)
                picture, _, stored = stored_picture(data, storable(row.name), row.image)
                look.take(picture.image.size, len(stored), row.captions)
        read += of_unit.bytes_read
        look.is_estimate |= not of_unit.is_whole
    look.is_estimate |= len(chosen) < len(listing.units)
    size = sum(unit.file.size for unit in listing.units)
    look.rows = round(look.looked * size / read) if look.is_estimate and read else look.looked
    return look


class _UnitRows:
    """The first rows of a file, and afterwards what of it was read."""

    def __init__(self, rules: RowRules, unit: SourceUnit, most: int) -> None:
        self.rules, self.unit, self.most = rules, unit, most
        self.bytes_read, self.is_whole = 0, False

    def __iter__(self) -> Iterator[SourceRow]:
        if self.unit.problem:
            self.is_whole = True
            yield SourceRow("", problem=self.unit.problem)
            return
        rows, count = open_rows(self.rules, self.unit, open_store(self.unit.file.base)), 0
        try:
            for row in islice((row for row in rows if isinstance(row, SourceRow)), self.most):
                count += 1
                yield row
            self.is_whole = count < self.most
        except (StoreNotFound, StoreDenied) as error:
            yield SourceRow("", problem=str(error))
        self.bytes_read = self.unit.file.size if self.is_whole else rows.bytes_read


def _order(name: str) -> bytes:
    return hashlib.sha256(b"look:" + name.encode("utf-8", "surrogateescape")).digest()
