"""A table of images as ingest takes it: rows of paths and captions by shards.

The driver reads the table once, looks every path up, and opens no image. Of a row it holds where it stands and what says that it is
unchanged: 52 bytes while rows are dealt, then 14 (`tests/sd3core/data/test_listed_table.py` measures it), in 16 microseconds of CPU
and the time that its drive takes for one question. Whoever makes a shard reads its rows from the table. Rows of one image lie in one shard: their captions become the image's, in the order of the rows.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
import struct
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd3core.data.folder_captions import FolderChanged, ListedFile, ListedImage, as_listed
from sd3core.data.folder_listing import RACY_NS
from sd3core.data.folder_source import caption_notes, image_key
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.image_files.table_rows import TableFormat, read_format, shown_record, table_error
from sd3core.data.slices import deal_slices, slice_hash
from sd3core.errors import UserError, is_of_the_machine, with_mend
from sd3core.files.local_paths import FILE_URL, path_of_url
from sd3core.recipe import Data

LOOKING_THREADS = 16  # a network drive answers many questions at once
ROWS_A_LOOK = 512
URL_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

MISSING = "no such file"
NO_FILE = "its path is no file"
URL_IN_ROW = "its path is a URL; a table is of files of this machine: download them, or mount them"
LEADS_OUT = "its path leads out of the folder; write the whole path"
ROW_TWICE = "an earlier row has its image with these captions; keep one of them"


@dataclass(frozen=True)
class TablePaths:
    """Where a table's paths lead: `root` is where relative ones begin, `spelled` how else it may be written."""

    root: str
    spelled: str

    def find(self, written: str) -> tuple[str, str]:
        """(path, problem): relative to the root where it lies there, else absolute."""
        if written.startswith(FILE_URL):
            written = str(path_of_url(written))
        elif URL_PATH.match(written):
            return "", URL_IN_ROW
        if "\0" in written:
            return "", MISSING
        path = posixpath.normpath(written)
        if not path.startswith("/"):
            return ("", LEADS_OUT) if path.partition("/")[0] == ".." else (path, "")
        for root in (self.root, self.spelled):
            if path.startswith(root.rstrip("/") + "/"):
                return path[len(root.rstrip("/")) + 1 :], ""
        return path, ""


@dataclass(frozen=True, eq=False)
class TableSlice:
    """The rows of one shard: where they stand in the table, in order."""

    number: int
    root: str
    table: ListedFile
    format: TableFormat
    paths: TablePaths
    offsets: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int32
    seen: str  # another digest where a row is, or size or time of its file
    before: tuple[str, ...] = ()  # stems of the shards that its rows were in when the table was last ingested

    @property
    def rows(self) -> int:
        return len(self.offsets)

    def images(self) -> Iterator[ListedImage]:
        """An image for each path, with the captions of all its rows, and what a row has that is none.

        Raises FolderChanged where the table is not as it was listed.
        """
        found: dict[str, ListedImage] = {}
        problems: list[ListedImage] = []
        for record in self._records():
            row = self.format.row(record)
            path, problem = ("", row.problem) if row.problem else self.paths.find(row.path)
            if not problem and path in found:
                further = [text for text in row.texts if text not in found[path].texts]
                if further:
                    image = found[path]
                    found[path] = image._replace(texts=(*image.texts, *further), rows=image.rows + 1)
                problem = "" if further else ROW_TWICE
            elif not problem:
                found[path] = ListedImage(ListedFile(path, 0, 0), texts=row.texts)
            if problem:
                problems.append(ListedImage(ListedFile(shown_record(record), 0, 0), problem=problem))
        yield from (self._looked_up(image) for image in found.values())
        yield from problems

    def _records(self) -> list[bytes]:
        with as_listed(Path("/"), self.table) as opened:
            records = []
            for offset, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True):
                opened.seek(offset)
                records.append(opened.read(length))
        return records

    def _looked_up(self, image: ListedImage) -> ListedImage:
        """The image with its file's size and time, or why there is none."""
        path = image.file.path
        try:
            found = os.stat(os.path.join(self.root, path))
        except (FileNotFoundError, NotADirectoryError):
            return image._replace(problem=MISSING)
        except OSError as error:
            if is_of_the_machine(error):
                raise UserError(f"data.table: {path}: {with_mend(error)}") from None
            return image._replace(problem=f"cannot be read: {with_mend(error)}")
        if not stat.S_ISREG(found.st_mode):
            return image._replace(problem=NO_FILE)
        return image._replace(file=ListedFile(path, found.st_size, found.st_mtime_ns))


class ListedTable:
    """The rows of a table, and sizes and times of their files. Raises DataError where it cannot be read."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.named = f"data.table {data.table}"  # in messages
        spelled = os.path.abspath(os.path.expanduser(data.table))
        base = os.path.abspath(os.path.expanduser(data.folder)) if data.folder else posixpath.dirname(spelled)
        self.place = Path(spelled)
        self.paths = TablePaths(os.path.realpath(base), base)
        self._offsets, self._lengths = array("q"), array("i")
        self._hashes, self._digests = array("Q"), array("Q")
        self._newest = 0
        began = time.time_ns()
        try:
            with self.place.open("rb") as file:
                status = os.fstat(file.fileno())
                self.table = ListedFile(spelled, status.st_size, status.st_mtime_ns)
                self.format = read_format(file, data)
                with ThreadPoolExecutor(LOOKING_THREADS, thread_name_prefix="table") as threads:
                    self._read(file, threads)
                after = os.fstat(file.fileno())
        except OSError as error:
            raise table_error(data.table, error) from None
        if (after.st_size, after.st_mtime_ns) != self.table[1:]:
            raise FolderChanged(self.place)
        self.at_rest = max(self._newest, self.table.mtime_ns) < began - RACY_NS
        self.digest = self._digest_of(self._digests)

    def _read(self, file: Any, threads: ThreadPoolExecutor) -> None:
        looks: deque[Future[tuple[array, int]]] = deque()
        waiting: list[tuple[str, bytes]] = []

        def look() -> None:
            looks.append(threads.submit(_look_up, self.paths.root, waiting.copy()))
            waiting.clear()

        for offset, record in self.format.records(file):
            row = self.format.row(record)
            path, problem = ("", row.problem) if row.problem else self.paths.find(row.path)
            self._offsets.append(offset)
            self._lengths.append(len(record))
            self._hashes.append(slice_hash(image_key(shown_record(record) if problem else path)))
            waiting.append((path, hashlib.blake2b(record, digest_size=16).digest()))
            if len(waiting) == ROWS_A_LOOK:
                look()
            while len(looks) > 2 * LOOKING_THREADS:
                self._take(looks.popleft())
        look()
        while looks:
            self._take(looks.popleft())

    def _take(self, look: Future[tuple[array, int]]) -> None:
        digests, newest = look.result()
        self._digests.extend(digests)
        self._newest = max(self._newest, newest)

    def notes(self) -> list[str]:
        """What is told before any image is opened: which columns are read where the recipe names none."""
        image, captions = self.format.fields
        if self.data.image_field and self.data.caption_fields:
            return []
        said = f"captions from {' and '.join(map(repr, captions))}" if captions else "no captions"
        return [f"{self.named}: images from {image!r}, {said} (data.image_field, data.caption_fields)"]

    def slices(self) -> list[TableSlice]:
        """Its rows by shards."""
        offsets = np.frombuffer(self._offsets, dtype=np.int64)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        dealt = deal_slices(np.frombuffer(self._hashes, dtype=np.uint64), self.data.rows_per_shard)
        common = (self.paths.root, self.table, self.format, self.paths)
        slices = []
        for number, places in dealt.items():
            in_order = np.sort(places)
            seen = self._digest_of(digests[in_order])
            slices.append(TableSlice(number, *common, offsets[in_order], lengths[in_order], seen))
        return slices

    def _digest_of(self, rows: array | np.ndarray) -> str:
        """Names rows as they are, and how they are read."""
        content = hashlib.sha256(repr((self.paths, self.format)).encode())
        content.update(rows)
        return content.hexdigest()[:32]

    def caption_notes(self, facts: Iterable[dict[str, Any]], captions_needed: bool) -> list[str]:
        """What is told of captions once all `facts` are known."""
        return caption_notes(self.data, facts, len(self._offsets), list, False, captions_needed)


def list_files(data: Data) -> ListedFolder | ListedTable:
    """The source of a recipe whose images are files of their own."""
    return ListedTable(data) if data.source == "table" else ListedFolder(data)


def _look_up(root: str, rows: list[tuple[str, bytes]]) -> tuple[array, int]:
    """For each (path, digest of its row) a digest that is another one where the file's size or time is; the newest time."""
    digests, newest = array("Q"), 0
    for path, of_row in rows:
        size, written = -1, -1
        if path:
            try:
                found = os.stat(os.path.join(root, path))
                size, written = found.st_size, found.st_mtime_ns
            except OSError:  # who makes the shard says what it is
                pass
        newest = max(newest, written)
        both = hashlib.blake2b(of_row + struct.pack("<qq", size, written), digest_size=8).digest()
        digests.append(int.from_bytes(both, "little"))
    return digests, newest
