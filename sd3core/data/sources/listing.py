"""Lists the files of `data.urls` by name, size and ETag or time, and opens none.

Beside a tar that img2dataset wrote stand a parquet file with a row for each URL, also of those that failed, and its statistics,
which are written last: where other tars of a folder have such, one without is not whole yet, and is not taken.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sd3core.data.folder_listing import RACY_NS
from sd3core.data.shards import parts_digest
from sd3core.data.sources.unit_numbers import number_units
from sd3core.data.sources.urls import UrlEntry, read_urls
from sd3core.data.store import Store, StoreDenied, StoreEntry, StoreNotFound, open_store
from sd3core.errors import DataError
from sd3core.recipe import Data
from sd3core.shown_text import printable
from sd3core.words import counted, some

SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}  # by data.source
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
STATS, ROWS_TABLE = "_stats.json", ".parquet"  # of img2dataset, in place of a tar's suffix
NOT_THERE = "data.urls names it, and it is not there"
DENIED = "access to it is denied"


@dataclass(frozen=True)
class SourceFile:
    """An object as it was listed. `base`: what a store is opened with, `path`: below that."""

    base: str
    path: str
    size: int
    tag: str  # ETag, or time in ns

    @property
    def url(self) -> str:
        return f"{self.base.rstrip('/')}/{self.path}"


@dataclass(frozen=True)
class SourceUnit:
    """A file of the source, and what belongs to it."""

    number: int  # of its first shard
    name: str  # its own in the whole source: its path below data.urls, or LABEL:PATH
    file: SourceFile
    table: SourceFile | None = None  # img2dataset's, with a row for each URL
    problem: str = ""  # why it is not read
    at_rest: bool = True  # not written to so shortly before that it may be written to again unseen

    @property
    def version(self) -> str:
        """Another one where it or its table is another one, or lies elsewhere: times and ETags say nothing across places."""
        files = [self.file] if self.table is None else [self.file, self.table]
        return parts_digest(self.problem, *(text for f in files for text in (os.fsencode(f.url), str(f.size), f.tag)))

    @property
    def megabytes(self) -> int:
        """What progress counts: begun ones."""
        return self.file.size // 1_000_000 + 1


@dataclass(frozen=True)
class SourceListing:
    units: tuple[SourceUnit, ...]  # by number
    notes: tuple[str, ...]  # what was passed over


def list_source(data: Data) -> SourceListing:
    """DataError where nothing is there to be read, StoreError where a bucket or folder cannot be listed."""
    return _Lister(data).listing()


class _Lister:
    def __init__(self, data: Data) -> None:
        self.data, self.suffix = data, SUFFIXES[data.source]
        self.entries = read_urls(data.urls, self.suffix)
        self.began = time.time_ns()
        self.found: dict[str, SourceUnit] = {}  # by URL
        self.passed: dict[str, dict[str, str]] = {}  # by what is told of them: URL -> path

    def listing(self) -> SourceListing:
        bases: dict[str, dict[str, StoreEntry]] = {}
        for entry in self.entries:
            store = open_store(entry.base)
            if entry.paths is not None and not entry.is_pattern:
                self._take_one(entry, store)
                continue
            if entry.base not in bases:
                bases[entry.base] = {object_.path: object_ for object_ in store.list()}
            self._take_all(entry, bases[entry.base])
        numbers = number_units([unit.name for unit in self.found.values()])
        if len(numbers) != len(self.found):
            raise DataError("data.urls: two of its files have one name below it; name the folder above both instead")
        numbered = (replace(unit, number=numbers[unit.name]) for unit in self.found.values())
        units = sorted(numbered, key=lambda unit: unit.number)
        return SourceListing(tuple(units), tuple(self._notes()))

    def _take_one(self, entry: UrlEntry, store: Store) -> None:
        """A file that is named alone, so that a user who may not list the bucket can read it."""
        (path,) = entry.paths
        try:
            tar = store.entry(path)
        except StoreNotFound:
            if not store.list(path):
                raise DataError(f"data.urls {entry.spelled}: no such file") from None
            raise DataError(f"data.urls {entry.spelled}: a folder; end its name with a slash and {{...}}") from None
        beside = {}
        if self.data.source == "webdataset":
            table = _stem(path) + ROWS_TABLE
            try:
                beside[table] = store.entry(table)
            except (StoreNotFound, StoreDenied):  # S3 says so of what is not there, too, to who may not list
                pass
        self._add(entry, tar, beside)

    def _take_all(self, entry: UrlEntry, objects: dict[str, StoreEntry]) -> None:
        if entry.paths is None:
            paths: Iterable[str] = [path for path in objects if self._is_wanted(entry, path)]
            if not paths:
                raise DataError(
                    f"data.urls {entry.spelled}: no such folder, or it holds no {self.suffix}{self._but()}; name another"
                )
        else:
            paths = entry.paths
            if not any(path in objects for path in paths):
                raise DataError(
                    f"data.urls {entry.spelled}: none of its {counted(len(entry.paths), 'file')} is there, the first is"
                    f" {entry.base.rstrip('/')}/{entry.paths[0]}; mend the pattern, or name the folder"
                )
        with_stats = {_folder(path) for path in objects if path.endswith(STATS) and _tar_of(path) in objects}
        for path in paths:
            if path not in objects:
                self._add(entry, StoreEntry(path, 0), {}, NOT_THERE)
            elif self.suffix == ".tar" and _folder(path) in with_stats and _stem(path) + STATS not in objects:
                self._pass(entry, "not whole yet, its writer has not put its _stats.json beside it", path)
            else:
                self._add(entry, objects[path], objects)

    def _is_wanted(self, entry: UrlEntry, path: str) -> bool:
        """Of a folder: what programs keep beside their data, and what they have not ended, is no part of it."""
        lower = path.lower()
        if any(part.startswith((".", "_")) for part in path.split("/")):
            if lower.endswith(self.suffix):
                self._pass(entry, "in a name that begins with . or _", path)
            return False
        if self.suffix == ".tar" and lower.endswith(COMPRESSED):
            self._pass(entry, "compressed, which is not read: unpack it to .tar", path)
        if not lower.endswith(self.suffix):
            return False
        if "_incomplete" in lower:
            self._pass(entry, "not whole yet, as its name says", path)
            return False
        return True

    def _add(self, entry: UrlEntry, tar: StoreEntry, objects: dict[str, StoreEntry], problem: str = "") -> None:
        file = SourceFile(entry.base, tar.path, tar.size, tar.tag)
        table = objects.get(_stem(tar.path) + ROWS_TABLE) if self.data.source == "webdataset" else None
        beside = SourceFile(entry.base, table.path, table.size, table.tag) if table else None
        at_rest = all(self._at_rest(entry.base, each) for each in (tar, table) if each)
        name = f"{entry.label}:{tar.path}" if entry.label else tar.path
        # two URLs may name one file: the first has it
        self.found.setdefault(file.url, SourceUnit(0, name, file, beside, problem, at_rest))

    def _at_rest(self, base: str, entry: StoreEntry) -> bool:
        """An ETag is of the bytes; a time may stay the same when a file is written to again at once."""
        return base.startswith("s3://") or not entry.tag or int(entry.tag) < self.began - RACY_NS

    def _pass(self, entry: UrlEntry, why: str, path: str) -> None:
        """Two URLs may name one file: it is told once."""
        self.passed.setdefault(why, {})[f"{entry.base}/{path}"] = path

    def _but(self) -> str:
        return "".join(f" ({note})" for note in self._notes())

    def _notes(self) -> list[str]:
        return [
            f"{counted(len(paths), 'file')} of data.urls passed over, {why}: {printable(some(sorted(paths.values()), len(paths)))}"
            for why, paths in self.passed.items()
        ]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _stem(path: str) -> str:
    """The path without its last suffix."""
    return path[: path.rfind(".")]


def _tar_of(stats: str) -> str:
    return stats.removesuffix(STATS) + ".tar"
