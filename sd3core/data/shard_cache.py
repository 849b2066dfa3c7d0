"""Reads rows of stored shards by their ranges, each checked once on this machine.

What may be needed again is kept on its disk.

In `folder`, which the processes of a machine share and which has at most about `max_bytes`, lie

    rows-NAME-BOOT  tables that are made once a machine and mapped by all of its processes (sd3core.data.shard_rows)
    kept-NAME-BOOT  of a store elsewhere, the rows of a tar that were fetched, at their places: a sparse file
    checked-NAME    of a store of files, a byte for each block of a tar: whether the row that begins there was checked

BOOT names the start of the machine: what nobody has waited for the disk to write is good for as long as it runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa

from sd3core.data.shards import TAR_BLOCK, not_of_its_manifest
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.errors import DataError, StoreError
from sd3core.files.whole_output import PARTIAL, atomic_replacement

STALE_PARTIAL_S = 3600  # a file being written for so long belongs to a killed process
READ_THREADS = 16  # requests under way
WASTE = 1 / 8  # of the bytes of a request that may lie between the rows that are wanted
# a plan's piece of whole captions; times READ_THREADS it is all that requests hold at once
SPAN_BYTES_AT_MOST = 8 << 20
SCANS = 64  # the folder is looked through after so small a part of its room has been written by this process


@cache
def boot() -> str:
    """Names the start of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:  # not Linux
        return f"{round((time.time() - time.monotonic()) / 600):08x}"


@dataclass(frozen=True)
class StoredRow:
    """One file in a stored tar, with its header before it."""

    path: str
    digest: str  # of the tar: names what is kept of it
    offset: int
    length: int
    sha256: bytes  # of the file


class ShardCache:
    """Rows of tars, and tables made from indexes. Several processes may use one folder.

    Whatever is read from the store is compared with its digest, once on this machine: what has been kept, or stands
    unchanged in a store of files, is not hashed again. Files that were not used for longest make room.
    """

    def __init__(self, store: Store, folder: Path, max_bytes: float) -> None:
        self.store, self.folder, self.max_bytes = store, folder, max_bytes
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="reading")
        self._lock = threading.Lock()
        self._until_scan = 0.0  # bytes

    def read(self, rows: Sequence[StoredRow], *, keep: bool = False) -> list[bytes]:
        """The files of these rows. Rows that lie near each other come by one request; `keep` keeps what a store elsewhere
        gave. DataError where a tar is gone or is not the one that its manifest names.
        """
        by_tar: dict[str, list[StoredRow]] = defaultdict(list)
        for row in rows:
            by_tar[row.path].append(row)
        files: dict[tuple[str, int], bytes] = {}
        spans: list[tuple[_Tar, list[StoredRow]]] = []
        for path, wanted in by_tar.items():
            tar = self._tar(path, wanted[0].digest, keep)
            missing = []
            for row in {row.offset: row for row in wanted}.values():
                data = tar.kept(row)
                if data is None:
                    missing.append(row)
                else:
                    files[path, row.offset] = _file_of(data, row)
            spans += [(tar, span) for span in spans_of(missing)]
        for found in self._threads.map(self._read_span, spans):
            files |= found
        return [files[row.path, row.offset] for row in rows]

    def table(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """A table of this machine, made by the first process that asks for it since the machine was started."""
        name = f"{name}-{boot()}"
        table = self._map(name)
        if table is None:
            with self._only_one(name):
                table = self._map(name)  # another process may have made it meanwhile
                if table is None:
                    sink = pa.BufferOutputStream()
                    made = make().combine_chunks()
                    with pa.ipc.new_file(sink, made.schema) as file:
                        file.write_table(made)
                    self._put(name, sink.getvalue())
                    table = self._map(name)
                    if table is None:  # another process has made room meanwhile
                        return made
        return table

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _tar(self, path: str, digest: str, keep: bool) -> _Tar:
        local = self.store.local_path(path)
        if local is not None:
            try:
                status = local.stat()
            except OSError:
                raise self._gone(path) from None
            standing = f"{digest}/{status.st_dev}/{status.st_ino}/{status.st_size}/{status.st_mtime_ns}"
            return _Tar(path, self, f"checked-{hashlib.sha256(standing.encode()).hexdigest()[:32]}", elsewhere=False)
        return _Tar(path, self, f"kept-{digest[:32]}-{boot()}" if keep else None, elsewhere=True)

    def _read_span(self, wanted: tuple[_Tar, list[StoredRow]]) -> dict[tuple[str, int], bytes]:
        tar, rows = wanted
        begin, end = rows[0].offset, max(row.offset + row.length for row in rows)
        try:
            data = memoryview(self.store.get_range(tar.path, begin, end - begin))
        except StoreNotFound:
            raise self._gone(tar.path) from None
        except StoreDamaged:
            raise not_of_its_manifest(self.store.uri(tar.path)) from None
        files, new = {}, []
        for row in rows:
            part = data[row.offset - begin : row.offset - begin + row.length]
            file = _file_of(part, row)
            if not tar.is_checked(row):
                if hashlib.sha256(file).digest() != row.sha256:
                    raise not_of_its_manifest(self.store.uri(tar.path))
                new.append((row, part))
            files[tar.path, row.offset] = file
        tar.note(new)
        return files

    def _gone(self, path: str) -> DataError:
        return DataError(
            f"{self.store.uri(path)}: its manifest names it and it is gone;"
            " delete the shard's done record and run the stage again"
        )

    def _map(self, name: str) -> pa.Table | None:
        path = self.folder / name
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            os.utime(path)
        except FileNotFoundError:  # never there, or another process made room
            return None
        except pa.ArrowInvalid:  # somebody has written to it
            path.unlink(missing_ok=True)
            return None
        return table

    def _put(self, name: str, data: pa.Buffer) -> None:
        with self.writing(data.size), atomic_replacement(self.folder / name, mode=0o600, durable=False) as file:
            file.write(data)

    @contextmanager
    def writing(self, size: int) -> Iterator[None]:
        """For writing so many bytes to the folder: makes room; trouble with this disk is a StoreError."""
        try:
            with self._lock:
                self._until_scan -= size
                if self._until_scan < 0:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._make_room(size)
                    self._until_scan = self.max_bytes / SCANS
            yield
        except OSError as error:
            raise StoreError(
                f"shard cache {self.folder}: {error.strerror or error}; lower compute.cache_gb, or make room there"
            ) from None

    def _make_room(self, needed: int) -> None:
        """Leaves an eighth of the room free: other processes write too before they look."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.startswith(PARTIAL):
                if time.time() - status.st_mtime > STALE_PARTIAL_S:
                    Path(entry.path).unlink(missing_ok=True)
            elif not entry.name.startswith("."):
                files.append((status.st_mtime, status.st_blocks * 512, entry.path))
        total = needed + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes * 7 / 8:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _only_one(self, name: str) -> Iterator[None]:
        """One process at a time for names that end alike; the lock goes with a process that is killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f".lock-{name[-2:]}").open("ab")
        except OSError as error:
            raise StoreError(f"shard cache {self.folder}: {error.strerror or error}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _Tar:
    """What this machine has of one tar: rows kept of a store elsewhere, or notes of what was checked of a file."""

    def __init__(self, path: str, cache: ShardCache, name: str | None, *, elsewhere: bool) -> None:
        self.path, self.cache, self.elsewhere = path, cache, elsewhere
        self.file = cache.folder / name if name else None

    def kept(self, row: StoredRow) -> bytes | None:
        """The row with its header where it was kept. A header is written last: without it there is nothing."""
        data = self._pread(row.length, row.offset) if self.elsewhere else b""
        return data if len(data) == row.length and data[0] else None

    def is_checked(self, row: StoredRow) -> bool:
        return not self.elsewhere and self._pread(1, row.offset // TAR_BLOCK) == b"\1"

    def note(self, rows: list[tuple[StoredRow, memoryview]]) -> None:
        """Of rows that were found to be what their digests say."""
        if self.file is None or not rows:
            return
        if self.elsewhere:
            self._write([(row.offset + TAR_BLOCK, data[TAR_BLOCK:]) for row, data in rows])
            self._write([(row.offset, data[:TAR_BLOCK]) for row, data in rows])
        else:
            with suppress(StoreError):  # without a note they are read and hashed again
                self._write([(row.offset // TAR_BLOCK, b"\1") for row, _ in rows])

    def _write(self, parts: list[tuple[int, bytes | memoryview]]) -> None:
        with self.cache.writing(sum(len(data) for _, data in parts)):
            file = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                for offset, data in parts:
                    os.pwrite(file, data, offset)
            finally:
                os.close(file)

    def _pread(self, length: int, offset: int) -> bytes:
        if self.file is None:
            return b""
        with suppress(OSError):  # never there, or another process made room
            file = os.open(self.file, os.O_RDONLY)
            try:
                return os.pread(file, length, offset)
            finally:
                os.close(file)
        return b""


def spans_of(rows: Sequence[StoredRow]) -> list[list[StoredRow]]:
    """Rows of one tar in groups that are read by one request each: at most WASTE of its bytes belong to no row."""
    spans: list[list[StoredRow]] = []
    wanted = begin = 0
    for row in sorted(rows, key=lambda row: row.offset):
        size = row.offset + row.length - begin
        if spans and size - wanted - row.length <= WASTE * size and size <= SPAN_BYTES_AT_MOST:
            spans[-1].append(row)
            wanted += row.length
        else:
            spans.append([row])
            begin, wanted = row.offset, row.length
    return spans


def _file_of(data: bytes | memoryview, row: StoredRow) -> bytes:
    """The file behind a tar header, a copy. What is no header gives what no digest is of."""
    with suppress(ValueError):
        return bytes(data[TAR_BLOCK : TAR_BLOCK + int(bytes(data[124:136]).rstrip(b"\0 "), 8)])
    return b""
