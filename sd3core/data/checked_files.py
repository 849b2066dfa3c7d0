"""Files whose bytes this machine has compared with a digest: each once as it stands, not by every process again.

A note is an empty file named by the digest and by what shows that a file was changed: disk, inode, size and time. It holds
for a file that is renamed.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from sd3core.data.store import Store, StoreNotFound


class CheckedFiles:
    """Notes in `folder`, which several processes may share. Without the right to write there, files are read again."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def is_whole(self, path: Path, sha256: str, size: int, *, reread: bool = False) -> bool:
        """Whether the file is there with these bytes. It is read unless it was found whole before and has not been
        changed since; `reread` reads it whatever was found before.
        """
        before = _standing(path)
        if before is None or before[2] != size:
            return False
        note = self.folder / hashlib.sha256(repr((sha256, before)).encode()).hexdigest()[:32]
        if note.exists() and not reread:
            return True
        if sha256_of(path) != sha256:
            with suppress(OSError):
                note.unlink(missing_ok=True)
            return False
        if _standing(path) == before:  # nobody wrote to it meanwhile
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                note.touch()
        return True

    def holds(self, store: Store, path: str, sha256: str, size: int) -> bool:
        """Whether a stored object is there with these bytes; of a store elsewhere the size alone is asked: whoever reads
        the object compares its bytes.
        """
        local = store.local_path(path)
        if local is not None:
            return self.is_whole(local, sha256, size)
        try:
            return store.size(path) == size
        except StoreNotFound:
            return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _standing(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when a file does; None where there is none. Links are followed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
