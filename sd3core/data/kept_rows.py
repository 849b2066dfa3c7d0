"""Which rows of each raw shard a filter keeps.

A keep-list's main file holds the keys that stay, and nothing else: its digest names just that set. So what is made later is named
by which rows there are, whatever the rules were that chose them, and a filter that leaves nothing out changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.shards import read_table
from sd3core.data.store import Store, canonical_json


@dataclass(frozen=True)
class KeepList:
    """Of one shard that loses rows."""

    folder: str
    stem: str
    digest: str
    rows: int  # that stay

    def taken_of(self, store: Store, index: pa.Table) -> pa.Table:
        """The rows of a raw index that stay. DataError where the list is damaged."""
        keys = read_table(store, self.folder, self.stem, self.digest)["key"]
        return index.filter(pc.is_in(index["key"], value_set=keys))


@dataclass(frozen=True)
class KeptRows:
    """The keep-lists by their shard's number; a shard that loses nothing has none."""

    lists: Mapping[int, KeepList] = field(default_factory=dict)

    @classmethod
    def of(cls, keep: Manifest) -> KeptRows:
        return cls(
            {
                entry.number: KeepList(keep.folder, entry.stem, entry.digest, entry.rows)
                for entry in keep.shards
                if entry.failed
            }
        )

    @classmethod
    def read(cls, store: Store, keep: ManifestRef | None) -> KeptRows:
        """All rows, where there is no filter."""
        return cls.of(read_manifest(store, keep.folder, keep.digest)) if keep else ALL_ROWS

    @property
    def inputs(self) -> dict[str, str]:
        """What stands among a manifest's inputs, by which rows stay; nothing where all do."""
        if not self.lists:
            return {}
        named = {f"{number}": keep.digest for number, keep in self.lists.items()}
        return {"keep": hashlib.sha256(canonical_json(named)).hexdigest()}

    def taken_of(self, store: Store, number: int, index: pa.Table) -> pa.Table:
        """The rows of the raw index of a shard that stay."""
        return self.lists[number].taken_of(store, index) if number in self.lists else index


ALL_ROWS = KeptRows()
