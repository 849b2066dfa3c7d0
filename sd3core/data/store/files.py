"""A store that is a folder of this machine, or one that all machines see."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from sd3core.data.store.contract import Store, StoreDenied, StoreEntry, StoreNotFound, checked, too_short
from sd3core.errors import StoreError, with_mend
from sd3core.files.local_paths import expanded
from sd3core.files.whole_output import PARTIAL, atomic_replacement

ABANDONED_FILE_S = 3600  # a file being written that has not grown for so long has lost its writer
COPY_BYTES = 1 << 20


class FileStore(Store):
    """A folder. Objects are written beside their place and renamed into it."""

    def __init__(self, root: Path | str) -> None:
        self.root = expanded(root).resolve()
        super().__init__(self.root.as_uri())

    def __reduce__(self) -> tuple[Any, ...]:
        return FileStore, (self.root,)

    def uri(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(checked(path))}"

    def local_path(self, path: str) -> Path:
        return self.root / checked(path)

    def get(self, path: str) -> bytes:
        with self._reading(path):
            return self.local_path(path).read_bytes()

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        with self._reading(path), self.local_path(path).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise too_short(self.uri(path), offset + length)
        return data

    def put(self, path: str, data: bytes) -> None:
        with self._replacing(path) as file:
            file.write(data)

    def put_file(self, path: str, local: Path) -> None:
        with local.open("rb") as source, self._replacing(path) as file:
            shutil.copyfileobj(source, file, COPY_BYTES)

    def get_file(self, path: str, local: Path) -> None:
        with self._reading(path):
            source = self.local_path(path).open("rb")
        with source, _replaced(local, str(local)) as file:
            shutil.copyfileobj(source, file, COPY_BYTES)

    def version(self, path: str) -> tuple[int, str]:
        status = self._status(path)
        return status.st_size, f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}"

    def entry(self, path: str) -> StoreEntry:
        return _entry(path, self._status(path))

    def _status(self, path: str) -> os.stat_result:
        with self._reading(path):
            target = self.local_path(path)
            status = target.stat()
        if not target.is_file():
            raise StoreNotFound(f"{self.uri(path)}: no such object")
        return status

    def check(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StoreError(f"{self.url}: cannot be written: {with_mend(error)}") from None

    def now(self) -> float:
        with suppress(OSError), tempfile.TemporaryFile(dir=self.root) as file:
            return os.fstat(file.fileno()).st_mtime
        return time.time()  # nothing stands there, or this process may not write

    def list(self, prefix: str = "") -> list[StoreEntry]:
        start = self.root / checked(prefix.rstrip("/")) if prefix else self.root
        entries = []
        for folder, _, names in os.walk(start, onerror=self._cannot_list):
            for name in names:
                if PARTIAL not in name:
                    full = Path(folder, name)
                    try:
                        entries.append(_entry(full.relative_to(self.root).as_posix(), full.stat()))
                    except FileNotFoundError:  # deleted while we listed
                        continue
        return sorted(entries)

    def folders(self, prefix: str = "") -> list[str]:
        start = self.root / checked(prefix.rstrip("/")) if prefix else self.root
        try:
            with os.scandir(start) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            self._cannot_list(error)
            return []

    def delete(self, path: str) -> None:
        try:
            self.local_path(path).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreError(f"{self.uri(path)}: cannot be deleted: {with_mend(error)}") from None

    def remove_abandoned(self, prefix: str) -> None:
        for folder, _, names in os.walk(self.root / checked(prefix.rstrip("/"))):
            for partial in (Path(folder, name) for name in names if name.startswith(PARTIAL)):
                with suppress(OSError):  # another process has removed it, or this one may not: it is in nobody's way
                    if time.time() - partial.stat().st_mtime > ABANDONED_FILE_S:
                        partial.unlink()

    def _cannot_list(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those are folders without objects
            raise StoreError(f"{self.url}: {error.filename} cannot be listed: {with_mend(error)}") from None

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise StoreNotFound(f"{self.uri(path)}: no such object") from None
        except PermissionError as error:
            raise StoreDenied(f"{self.uri(path)}: cannot be read: {with_mend(error)}") from None
        except OSError as error:
            raise StoreError(f"{self.uri(path)}: cannot be read: {with_mend(error)}") from None

    def _replacing(self, path: str):
        return _replaced(self.local_path(path), self.uri(path))


def _entry(path: str, status: os.stat_result) -> StoreEntry:
    return StoreEntry(path, status.st_size, status.st_mtime, str(status.st_mtime_ns))


@contextmanager
def _replaced(target: Path, shown: str) -> Iterator[BinaryIO]:
    """`atomic_replacement`, in a folder that is made; all users of the machine may read what a store holds."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replacement(target) as file:
            os.fchmod(file.fileno(), 0o644)
            yield file
    except OSError as error:
        raise StoreError(f"{shown}: cannot be written: {with_mend(error)}") from None
