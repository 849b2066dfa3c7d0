"""Finds a shard's rows in shards made before: only new or changed ones are made.

A row is taken over with the bytes that it has there, after the digests of that shard are compared with its done record. What is
missing or damaged is told, and its rows are made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from sd3core.data.records import sha256_of
from sd3core.data.shards import (
    IMAGE_DIGEST,
    DoneRecord,
    not_of_its_manifest,
    read_samples,
    read_shard_done,
    read_shard_index,
    read_table,
)
from sd3core.data.store import Store, is_transient
from sd3core.errors import DataError, StoreError
from sd3core.specs import INDEX, TABLE, TAR

RowName = tuple[
    str, str | None
]  # key, and short digest of the image; None in the drawn world, where a key is one image


def row_name(row: dict[str, Any]) -> RowName:
    """What says that a row is of the same image: for rows of a raw index, and of what is made from it."""
    return row["key"], row.get(IMAGE_DIGEST)


@dataclass(frozen=True)
class EarlierRow:
    """A row of an earlier shard's index, and where its sample lies on this machine."""

    row: dict[str, Any]
    tar: Path

    def files(self) -> dict[str, bytes]:
        with self.tar.open("rb") as file:
            file.seek(self.row["offset"])
            data = file.read(self.row["length"])
        ((_, files),) = read_samples(data)
        return files


class EarlierRows:
    """The rows of finished shards of a folder; a context, which ends what was fetched of them."""

    def __init__(self, store: Store, folder: str, stems: Sequence[str]) -> None:
        self.store, self.folder, self.stems = store, folder, stems
        self.told: list[str] = []  # a line for each shard that was no use

    def __enter__(self) -> Self:
        self._scratch = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def find(
        self, wanted: AbstractSet[Hashable], named: Callable[[dict[str, Any]], Hashable]
    ) -> dict[Hashable, EarlierRow]:
        """Which of the `wanted` stand in earlier tars, by what `named` makes of an index row."""
        found: dict[Hashable, EarlierRow] = {}
        for stem in self.stems:
            for done, index in self._whole(stem, INDEX, read_shard_index):
                rows = {named(row): row for row in reversed(index.to_pylist())}  # the first of each is the one
                here = rows.keys() & (wanted - found.keys())
                for tar in self._tars(stem, done) if here else ():
                    found |= {name: EarlierRow(rows[name], tar) for name in here}
        return found

    def find_in_tables(
        self, wanted: AbstractSet[Hashable], named: Callable[[dict[str, Any]], Hashable]
    ) -> dict[Hashable, dict[str, Any]]:
        """Which of the `wanted` stand in earlier tables."""
        found: dict[Hashable, dict[str, Any]] = {}
        for stem in self.stems:
            for _, table in self._whole(stem, TABLE, read_table):
                rows = {named(row): row for row in table.to_pylist()}
                found |= {name: rows[name] for name in rows.keys() & (wanted - found.keys())}
        return found

    def _whole(
        self, stem: str, suffix: str, read: Callable[[Store, str, str, str], pa.Table]
    ) -> Iterator[tuple[DoneRecord, pa.Table]]:
        """The done record and the index or table of an earlier shard; nothing where one of them is damaged or gone."""
        try:
            done = read_shard_done(self.store, self.folder, stem)
            rows = read(self.store, self.folder, stem, done.files.get(suffix, ""))
        except (DataError, StoreError) as error:
            self._of_no_use(stem, suffix, error)
        else:
            yield done, rows

    def _tars(self, stem: str, done: DoneRecord) -> Iterator[Path]:
        """The earlier shard's tar on this machine, its digest compared; nothing where it is damaged or gone."""
        path = f"{self.folder}/{stem}{TAR}"
        try:
            local = self.store.local_path(path)
            if local is None:
                scratch = self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="sd3-earlier-"))
                local = Path(scratch, "shard.tar")
                self.store.get_file(path, local)
            if not local.is_file() or sha256_of(local) != done.files.get(TAR):
                raise not_of_its_manifest(self.store.uri(path))
        except (DataError, StoreError) as error:
            self._of_no_use(stem, TAR, error)
        else:
            yield local

    def _of_no_use(self, stem: str, suffix: str, error: Exception) -> None:
        """Tells of it. Raises the error of a store that cannot be reached: it says nothing of the shard."""
        if is_transient(error):
            raise error
        uri = self.store.uri(f"{self.folder}/{stem}{suffix}")
        self.told.append(f"{uri}: damaged or gone; what was to be taken from it is made again")
