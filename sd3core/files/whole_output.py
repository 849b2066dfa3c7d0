"""Files and folders on this machine that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sd3core.errors import UserError

PARTIAL = ".partial-"  # begins the names of files that are being written, to take another's place


@contextmanager
def atomic_output(out: Path | str) -> Iterator[Path]:
    """A path to make a file or a folder at, which becomes `out` when the block ends well; else nothing is left.

    It lies in a hidden folder beside `out`. What a killed process left of that, the next one for the same `out` removes.
    Raises UserError where `out` exists already.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; name another, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    for beside in list(out.parent.iterdir()):
        if beside.name.startswith(prefix):
            _remove_unless_held(beside)
    hidden, lock = _held_folder(out.parent, prefix)
    try:
        path = hidden / out.name
        yield path
        for file in (path, *path.rglob("*")):
            _sync(file)
        if os.path.lexists(out):
            raise UserError(f"{out} was made by another process meanwhile; name another, or remove it")
        path.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


@contextmanager
def atomic_replacement(target: Path, *, mode: int = 0o666, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `target` when the block ends well; else `target` is what it was.

    Readers see the old file or the new one, never a part. A killed process leaves a hidden PARTIAL file beside `target`.
    mode: less what the umask takes. durable: all of it is on disk before it takes the place.
    """
    partial = target.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with suppress(OSError):  # it has taken its place, or never began
            partial.unlink()


def _held_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor whose lock says that its maker lives: the system frees it, however that ends."""
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process took it for abandoned before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if hidden.exists():
            return hidden, lock
        os.close(lock)


def _remove_unless_held(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is gone, or nothing of ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
