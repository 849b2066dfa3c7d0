"""Remembers which version of each source file was made into which shards.

So none is read for nothing. Beside the shards stands a record of each file, written when all of its shards are done, and one of
the whole source, written at the run's end: a run that is killed between asks the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sd3core.data.seen_files import read_seen, write_seen
from sd3core.data.shards import shard_stem
from sd3core.data.sources.listing import SourceUnit
from sd3core.data.store import Store
from sd3core.specs import SEEN, SEEN_SOURCE, SEEN_UNIT

NoteFacts = dict[str, tuple[int, list[str]]]  # what is told -> of how many rows or files, and the first names


@dataclass(frozen=True)
class SeenUnit:
    """A source file as it was last read."""

    version: str  # of the file; "" where it is to be read again
    digests: tuple[str, ...]  # of its shards, as their names have them
    rows: int  # found, taken or not
    facts: NoteFacts

    def stems(self, number: int) -> list[str]:
        return [shard_stem(number + part, digest) for part, digest in enumerate(self.digests)]


def write_seen_unit(store: Store, folder: str, unit: SourceUnit, seen: SeenUnit) -> None:
    write_seen(store, _unit_path(folder, unit), {"unit": _fields(seen)})


def read_seen_unit(store: Store, folder: str, unit: SourceUnit) -> SeenUnit | None:
    """None where nothing is recorded of this file, or nothing that can be trusted."""
    record = read_seen(store, _unit_path(folder, unit))
    return _seen_unit(record["unit"]) if record is not None else None


def write_seen_source(store: Store, folder: str, units: Mapping[int, SeenUnit]) -> None:
    """`units`: all files of the source, by number."""
    fields = {str(number): _fields(unit) for number, unit in units.items()}
    write_seen(store, _source_path(folder), {"units": fields})


def read_seen_source(store: Store, folder: str) -> dict[int, SeenUnit] | None:
    """None where nothing is recorded, or nothing that can be trusted."""
    record = read_seen(store, _source_path(folder))
    if record is None:
        return None
    return {int(number): _seen_unit(fields) for number, fields in record["units"].items()}


def _fields(unit: SeenUnit) -> list:
    return [unit.version, unit.digests, unit.rows, unit.facts]


def _seen_unit(fields: Sequence) -> SeenUnit:
    version, digests, rows, facts = fields
    return SeenUnit(version, tuple(digests), rows, _facts(facts))


def _facts(facts: Mapping[str, Sequence]) -> NoteFacts:
    return {kind: (count, names) for kind, (count, names) in facts.items()}


def _unit_path(folder: str, unit: SourceUnit) -> str:
    return f"{folder}/{SEEN_UNIT}{unit.number}{SEEN}"


def _source_path(folder: str) -> str:
    return f"{folder}/{SEEN_SOURCE}{SEEN}"
