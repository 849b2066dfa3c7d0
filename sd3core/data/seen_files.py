"""Remembers what was seen of a folder's files, so that none is opened for nothing.

Beside every shard stands what was seen of its files (`SeenRow`), and beside all shards what was seen of the folder as a whole.
Both are records with their own digest. A file counts as unchanged where its path, size and time are; one that was written to
when it was looked at, or shortly before, is looked at again, as git does.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sd3core.data.caption_text import from_stored
from sd3core.data.folder_source import FolderItem, image_key
from sd3core.data.shards import parts_digest
from sd3core.data.store import Store, StoreNotFound
from sd3core.specs import SEEN, SEEN_FOLDER

UNKNOWN_TIME = -1  # of a file that is to be looked at again


class SeenRow(NamedTuple):
    """What one image file was, and what became of it."""

    path: str
    size: int
    mtime_ns: int  # UNKNOWN_TIME where the file is to be looked at again
    words_key: str  # ListedImage.words_key; "" where its words are
    sha256: str  # "" where it was not read
    caption: str | list[str]  # as_stored
    problem: str  # why it is not taken, as the listing or its words say
    cut: bool
    lines: int
    several: tuple[str, ...]
    hint: str
    image: str = ""  # short digest of the image that is stored; "" where none is, or it is not known
    failure: str = ""  # why its picture is of no use
    notes: tuple[str, ...] = ()  # what was done to its picture

    @property
    def is_at_rest(self) -> bool:
        return self.mtime_ns != UNKNOWN_TIME and self.words_key != ""

    def item(self) -> FolderItem:
        """What it was taken for."""
        told = {name: getattr(self, name) for name in ("sha256", "problem", "cut", "lines", "several", "hint")}
        return FolderItem(image_key(self.path), self.path, from_stored(self.caption), **told)


def seen_path(folder: str, stem: str) -> str:
    return f"{folder}/{stem}{SEEN}"


def write_seen_rows(store: Store, folder: str, stem: str, root: str, rows: Iterable[SeenRow]) -> None:
    write_seen(store, seen_path(folder, stem), {"root": root, "rows": [list(row) for row in rows]})


def read_seen_rows(store: Store, folder: str, stem: str, root: str) -> dict[str, SeenRow]:
    """By path; none where nothing is recorded, or nothing that can be trusted.

    Of another root's files only what follows from their bytes is taken, not that they are unchanged.
    """
    record = read_seen(store, seen_path(folder, stem))
    if record is None:
        return {}
    rows = {}
    for fields in record["rows"]:
        row = SeenRow(*(tuple(value) if isinstance(value, list) else value for value in fields))
        rows[row.path] = row if record["root"] == root else row._replace(mtime_ns=UNKNOWN_TIME, words_key="")
    return rows


@dataclass(frozen=True)
class SeenSlice:
    """A slice as it was last made."""

    seen: str  # digest of its listed files; "" where one of them is to be looked at again
    digest: str  # of its content, as its shard's name has it
    rows: int  # images found, taken or not
    facts: dict[str, Any]  # what is told of their captions, as `caption_facts` counts it


@dataclass(frozen=True)
class SeenFolder:
    """A folder as it was when it was last ingested."""

    listing: str = ""  # digest of all its names, sizes and times; "" where something is to be looked at again
    slices: dict[int, SeenSlice] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # all that was told

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.slices.values())


def write_seen_folder(store: Store, folder: str, root: Path, seen: SeenFolder) -> None:
    slices = {str(number): [part.seen, part.digest, part.rows, part.facts] for number, part in seen.slices.items()}
    write_seen(store, _folder_path(folder, root), {"listing": seen.listing, "slices": slices, "notes": seen.notes})


def read_seen_folder(store: Store, folder: str, root: Path) -> SeenFolder | None:
    """None where nothing is recorded of this root, or nothing that can be trusted."""
    record = read_seen(store, _folder_path(folder, root))
    if record is None:
        return None
    slices = {int(number): SeenSlice(*fields) for number, fields in record["slices"].items()}
    return SeenFolder(record["listing"], slices, record["notes"])


def _folder_path(folder: str, root: Path) -> str:
    return f"{folder}/{SEEN_FOLDER}{parts_digest(bytes(root))}{SEEN}"


def write_seen(store: Store, path: str, record: dict[str, Any]) -> None:
    """Two lines, compressed: the digest of the second, which is the record. Only what is another one than stands there."""
    line = json.dumps(record | {"path": path}, separators=(",", ":")).encode()
    data = gzip.compress(hashlib.sha256(line).hexdigest().encode() + b"\n" + line, mtime=0)
    with suppress(StoreNotFound):
        if store.get(path) == data:
            return
    store.put(path, data)


def read_seen(store: Store, path: str) -> dict[str, Any] | None:
    """A record that is what its digest says and stands where it was written; else None: the files are looked at then."""
    try:
        digest, _, line = gzip.decompress(store.get(path)).partition(b"\n")
        record = json.loads(line) if hashlib.sha256(line).hexdigest().encode() == digest else {}
    except (StoreNotFound, OSError, EOFError, zlib.error):
        return None
    return record if record.get("path") == path else None
