"""Records what runs have begun and not ended: begun/RUN/STAGE.HOME.json.

It is written before a stage's first byte, and removed after its last.

A run that was killed leaves it behind: so `sd3 clean` keeps what the same command goes on with, and what that starts from, also
where it was another home or machine. It decides nothing else. A home works on a run once at a time, so what it begins takes the
place of what it gave up for it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sd3core.data.store import Store, StoreDamaged, StoreEntry, StoreNotFound
from sd3core.errors import DataError
from sd3core.files.local_paths import sd3_home
from sd3core.specs import BEGUN, fingerprint

RECORD = re.compile(rf"{BEGUN}/([^/]+)/([^/]+)\.[0-9a-f]{{12}}\.json")


@dataclass(frozen=True)
class Begun:
    """`folder`: what it writes to. `record`: with `needs`, paths or URLs that it starts from, and `fields`, with digests of its inputs."""

    run: str
    stage: str
    folder: str
    record: dict[str, Any]
    entry: StoreEntry

    @property
    def line(self) -> str:
        since = f"began {self.record.get('began')} on {self.record.get('host')}"
        return f"{self.stage} of run {self.run} {since} and has not ended: the same command goes on"


def begin(
    store: Store,
    run: str,
    stage: str,
    folder: str,
    fields: dict[str, Any] | None = None,
    needs: Iterable[str | None] = (),
) -> None:
    """Called before the stage looks at what stands: what it finds, nobody removes then."""
    began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    record = {
        "folder": folder,
        "fields": fields or {},
        "needs": [need for need in needs if need],
        "host": socket.gethostname(),
        "began": began,
    }
    store.put_json(_own(run, stage), record)


def end(store: Store, run: str, stage: str, folder: str) -> None:
    """The word of this home goes, and that of every home that had begun this same folder. Call it when the stage's own note stands."""
    own = _own(run, stage)
    for entry in store.list(f"{BEGUN}/{run}"):
        name = RECORD.fullmatch(entry.path)
        if name and name[2] == stage:
            # another home's: it ended just now, or `sd3 clean` names the damage
            with suppress(StoreNotFound, StoreDamaged, DataError):
                if entry.path == own or _read(store, entry).folder == folder:
                    store.delete(entry.path)


def all_begun(store: Store) -> list[Begun]:
    """One listing. Read it before the stages' notes: what ends meanwhile is named by either. DataError for what is no such record."""
    found = []
    for entry in filter(lambda entry: RECORD.fullmatch(entry.path), store.list(BEGUN)):
        with suppress(StoreNotFound):  # it ended just now
            found.append(_read(store, entry))
    return found


def _read(store: Store, entry: StoreEntry) -> Begun:
    record = store.get_json(entry.path)
    if not isinstance(record, dict) or not isinstance(record.get("folder"), str):
        raise DataError(f"{store.uri(entry.path)}: not a record of what a run has begun; delete it, and run this again")
    run, stage = RECORD.fullmatch(entry.path).groups()
    return Begun(run, stage, record["folder"], record, entry)


def _own(run: str, stage: str) -> str:
    home = fingerprint([socket.gethostname(), str(sd3_home())])
    return f"{BEGUN}/{run}/{stage}.{home}.json"
