"""Keeps whole shards on this machine's disk: checked, bounded, shared.

All ranks of the machine read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd3core.data.shards import check_digest
from sd3core.data.store import Store, StoreNotFound
from sd3core.errors import DataError, StoreError
from sd3core.files.whole_output import PARTIAL, atomic_replacement

STALE_PARTIAL_S = 3600  # a file being written for so long belongs to a killed process


class ShardCache:
    """Copies of stored tars under their digests, at most `max_bytes` of them; those read longest ago make room.

    Every read is checked against the digest, so neither the store nor this disk can hand on damage. Several processes
    may use one folder: each shard is fetched by one of them while the others wait. A store of files is read where it
    lies.
    """

    def __init__(self, store: Store, folder: Path, max_bytes: float) -> None:
        self.store, self.folder, self.max_bytes = store, folder, max_bytes

    def read(self, path: str, digest: str) -> bytes:
        """The bytes of a stored tar. DataError if it is missing, or not the one that the manifest names."""
        if self.store.local_path(path) is not None:
            return self._fetch(path, digest)
        cached = self.folder / digest
        data = self._read_cached(cached, digest)
        if data is None:
            with self._only_one(digest):
                data = self._read_cached(cached, digest)  # another process may have fetched it meanwhile
                if data is None:
                    data = self._fetch(path, digest)
                    self._keep(cached, data)
        return data

    def _fetch(self, path: str, digest: str) -> bytes:
        try:
            data = self.store.get(path)
        except StoreNotFound:
            raise DataError(
                f"{self.store.uri(path)}: its manifest names it and it is gone;"
                " delete the shard's done record and run the stage again"
            ) from None
        check_digest(data, digest, self.store.uri(path))
        return data

    def _read_cached(self, cached: Path, digest: str) -> bytes | None:
        try:
            data = cached.read_bytes()
            os.utime(cached)
        except FileNotFoundError:  # never there, or another process made room
            return None
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        cached.unlink(missing_ok=True)  # a disk that lost power while writing
        return None

    def _keep(self, cached: Path, data: bytes) -> None:
        try:
            self._make_room(len(data))
            with atomic_replacement(cached, mode=0o600, durable=False) as file:  # reading compares it with its digest
                file.write(data)
        except OSError as error:
            raise StoreError(
                f"shard cache {self.folder}: {error.strerror or error}; lower compute.cache_gb, or make room there"
            ) from None

    def _make_room(self, needed: int) -> None:
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
                files.append((status.st_mtime, status.st_size, entry.path))
        total = needed + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _only_one(self, digest: str) -> Iterator[None]:
        """One process at a time for digests that begin alike; the lock goes with a process that is killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f".lock-{digest[:2]}").open("ab")
        except OSError as error:
            raise StoreError(f"shard cache {self.folder}: {error.strerror or error}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
