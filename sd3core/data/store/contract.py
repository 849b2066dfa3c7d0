"""What every kind of store keeps to, and the names of what it holds.

An object is there whole or not at all, a path never leaves the store, a missing object is StoreNotFound, and any other
trouble is a StoreError of one line. Nothing is built on conditional puts.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3core.errors import StoreError
from sd3core.files.whole_output import PARTIAL


class StoreNotFound(StoreError):
    """An object that the store does not hold."""


class StoreDamaged(StoreError):
    """An object whose bytes are not of the kind that was written there."""


class StoreDenied(StoreError):
    """An object that this user may not read or write."""


def is_transient(error: Exception) -> bool:
    """True for a store that cannot be reached just now; what it does not hold, or holds damaged, will not come by waiting."""
    return isinstance(error, StoreError) and not isinstance(error, StoreNotFound | StoreDamaged)


@dataclass(frozen=True, order=True)
class StoreEntry:
    path: str
    size: int
    modified: float = field(default=0.0, compare=False)  # when it was written, Unix seconds by the store's clock
    tag: str = field(default="", compare=False)  # ETag, or time in ns: another one once it has been written anew


class Store(ABC):
    """Objects under paths like `runs/mini/summary.json`. Pickles without its connections."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def __reduce__(self) -> tuple[Any, ...]: ...

    def __repr__(self) -> str:
        return f"open_store({self.url!r})"

    @abstractmethod
    def get(self, path: str) -> bytes: ...

    @abstractmethod
    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """Reads just those bytes; StoreDamaged where the object ends before them."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Writes whole or not at all; replaces what stood there."""

    @abstractmethod
    def put_file(self, path: str, local: Path) -> None:
        """Puts a file, which may be larger than memory, as `put` does bytes."""

    @abstractmethod
    def get_file(self, path: str, local: Path) -> None:
        """Replaces `local` when all of it is here."""

    @abstractmethod
    def version(self, path: str) -> tuple[int, str]:
        """The object's size, and a word that is another one once it has been written anew."""

    @abstractmethod
    def entry(self, path: str) -> StoreEntry:
        """The object as `list` has it."""

    def size(self, path: str) -> int:
        return self.version(path)[0]

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoreEntry]:
        """Every object below the folder `prefix`, sorted by path."""

    @abstractmethod
    def folders(self, prefix: str = "") -> list[str]:
        """The names of the folders directly below the folder `prefix`, sorted; what lies deeper is not looked at.

        A store that is files may name some that hold nothing any more.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes an object; one that is not there is no error."""

    def remove_abandoned(self, prefix: str) -> None:
        """Removes what killed writers left below the folder `prefix`, where the store keeps such things at all."""

    def local_path(self, path: str) -> Path | None:
        """Where the object lies on this machine, for stores that are files; None otherwise."""
        return None

    def check(self) -> None:
        """StoreError where it cannot be reached, or could not be written to: asked before work begins."""
        self.exists("any")  # whatever it is: an answer is enough

    def now(self) -> float:
        """Unix seconds by the clock that `modified` is of: this machine's may be another."""
        return time.time()

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except StoreNotFound:
            return False
        return True

    def get_json(self, path: str) -> Any:
        data = self.get(path)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise StoreDamaged(f"{self.uri(path)}: not JSON; delete it and run the stage that makes it again") from None

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, canonical_json(value))

    def uri(self, path: str) -> str:
        """The object's full URL."""
        return f"{self.url}/{checked(path)}"


def canonical_json(value: Any) -> bytes:
    """Sorted keys, indent 1, a newline at the end: the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def checked(path: str) -> str:
    """The path, if it stays inside the store; StoreError otherwise."""
    if (
        not path
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or any(part in ("", ".", "..") for part in path.split("/"))
    ):
        raise StoreError(f"store path {path!r}: it must be relative and stay inside the store")
    if PARTIAL in path:
        raise StoreError(f"store path {path!r}: {PARTIAL!r} marks files being written; take another name")
    return path


def too_short(uri: str, end: int) -> StoreDamaged:
    return StoreDamaged(f"{uri}: ends before byte {end}; it is not the file that its index describes")
