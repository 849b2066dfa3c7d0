"""Remembers which files this machine has compared with a digest.

Each is compared once as it stands, not by every process again.

A note is an empty file named by the digest and by what shows that a file was changed: disk, inode, size and time, so that it
holds for a file that is renamed; of an object in a store elsewhere its URL, path, size and ETag.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from sd3core.data.records import FileRecord, sha256_of
from sd3core.data.store import Store, StoreNotFound

SPAN_BYTES = 64 << 20  # of an object that is read to be compared: it need fit neither memory nor disk
Standing = tuple[str | int, str | int, int, str | int]  # what changes when the bytes do; the size is the third


class CheckedFiles:
    """Notes in `folder`, which several processes may share. Without the right to write there, files are read again."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def is_whole(self, path: Path, record: FileRecord, *, reread: bool = False) -> bool:
        """Whether the file is there with these bytes. It is read unless it was found whole before and has not been
        changed since; `reread` reads it whatever was found before.
        """
        return self._compare(partial(_of_file, path), partial(sha256_of, path), record, reread)

    def holds(self, store: Store, path: str, record: FileRecord) -> bool:
        """Whether a stored object is there with these bytes, read as a file is."""
        local = store.local_path(path)
        if local is not None:
            return self.is_whole(local, record)
        return self._compare(
            partial(_of_object, store, path), partial(_sha256_of_object, store, path, record.bytes), record
        )

    def fetch(self, store: Store, path: str, target: Path, record: FileRecord) -> bool:
        """Fetches an object of a store elsewhere; says whether it came with these bytes, and notes it of both."""
        before = _of_object(store, path)
        store.get_file(path, target)
        whole = self.is_whole(target, record, reread=True)
        if not whole or _of_object(store, path) == before:
            self._note(record.sha256, before, whole)
        return whole

    def _compare(
        self,
        standing: Callable[[], Standing | None],
        digest: Callable[[], str | None],
        record: FileRecord,
        reread: bool = False,
    ) -> bool:
        before = standing()
        if before is None or before[2] != record.bytes:
            return False
        if not reread and self._path(record.sha256, before).exists():
            return True
        whole = digest() == record.sha256
        if not whole or standing() == before:  # else somebody wrote to it meanwhile
            self._note(record.sha256, before, whole)
        return whole

    def _note(self, sha256: str, standing: Standing | None, whole: bool) -> None:
        with suppress(OSError):
            if whole:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._path(sha256, standing).touch()
            else:
                self._path(sha256, standing).unlink(missing_ok=True)

    def _path(self, sha256: str, standing: Standing | None) -> Path:
        return self.folder / hashlib.sha256(repr((sha256, standing)).encode()).hexdigest()[:32]


def _sha256_of_object(store: Store, path: str, size: int) -> str | None:
    """None where it is gone meanwhile."""
    digest = hashlib.sha256()
    try:
        for start in range(0, size, SPAN_BYTES):
            digest.update(store.get_range(path, start, min(SPAN_BYTES, size - start)))
    except StoreNotFound:
        return None
    return digest.hexdigest()


def _of_file(path: Path) -> Standing | None:
    """None where there is none. Links are followed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _of_object(store: Store, path: str) -> Standing | None:
    try:
        return store.url, path, *store.version(path)
    except StoreNotFound:
        return None
