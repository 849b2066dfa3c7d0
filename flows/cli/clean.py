"""`sd3 clean` lists what no run uses any more, and removes what is named.

The store and this machine's cache are looked through; sizes are shown.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.local.home import home, lock_holder
from sd3core.data.store import Store, StoreEntry
from sd3core.data.unused import Unused, find_unused, remove
from sd3core.errors import UserError
from sd3core.specs import TOWERS, fingerprint, named_towers
from sd3core.towers.artifact import read_towers
from sd3core.words import DAY_S, GB, counted

ALL = "all"
CACHE = "cache/"  # before the name of what this machine keeps


def clean_store(store: Store, wanted: list[str], days: float, console: Console) -> None:
    """Lists what nobody uses, or removes those of it that are named; `all` names everything but what is unfinished.

    Raises UserError for a name that is not in the list, and where a run of this home is at work: it may be about to use what
    nobody used before. What runs of other homes and machines have begun, the store says.
    """
    found: dict[str, tuple[Unused, Callable[[], object]]] = {}
    for item in find_unused(store, days):
        found[item.name] = (item, partial(remove, store, item))
    for item in _unused_cache(store, days):
        found[item.name] = (item, partial(shutil.rmtree, home() / item.name, ignore_errors=True))
    if not wanted:
        return _print(store, [item for item, _ in found.values()], days, console)
    for name in wanted:
        if name != ALL and name not in found:
            raise UserError(
                f"--remove {name}: not in the list that `sd3 clean` prints; it is in use, younger than {days:g} days, or not there"
            )
    if busy := _run_at_work():
        raise UserError(f"{busy} is at work; wait for it, or end it, and remove then")
    chosen = [found[name] for name in found if ALL in wanted or name in wanted]
    for item, take_away in chosen:
        size = f"({item.bytes / GB:,.3f} GB)"
        if item.unfinished and item.name not in wanted:
            line = f"kept {item.name} {size}: {item.why}; `--remove {item.name}` removes it"
        elif take_away() is False:
            line = f"kept {item.name} {size}: a run has begun with it since"
        else:
            line = f"removed {item.name} {size}"
        console.print(line, soft_wrap=True, highlight=False)
    if not chosen:
        console.print("nothing to remove", highlight=False)


def _print(store: Store, items: list[Unused], days: float, console: Console) -> None:
    where = f"{store.url} and this machine's cache"
    if not items:
        console.print(f"{where}: nothing is unused and older than {days:g} days", soft_wrap=True, highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("unused", "GB", "objects", "last written", "why"):
        table.add_column(column, justify="right" if column in ("GB", "objects") else "left", overflow="fold")
    for item in items:
        written = datetime.fromtimestamp(item.written, UTC).strftime("%Y-%m-%d")
        table.add_row(item.name, f"{item.bytes / GB:,.3f}", f"{len(item.entries):,}", written, item.why)
    console.print(table)
    total = sum(item.bytes for item in items)
    console.print()
    console.print(
        f"{counted(len(items), 'thing')}, {total / GB:,.3f} GB, in {where}; `--remove NAME` removes one, `--remove all` all that is not unfinished",
        soft_wrap=True,
        highlight=False,
    )


def _unused_cache(store: Store, days: float) -> list[Unused]:
    """Fetched towers that are none of this store's and that nobody has read for so many days: they are fetched again."""
    folders = [path for path in (home() / "cache").glob("towers-*") if path.is_dir()]
    used = set()
    for name in store.folders(TOWERS) if folders else []:
        for spec in store.folders(named_towers(name)):
            try:
                used.add(f"towers-{fingerprint(read_towers(store, named_towers(name, spec)).digests)}")
            except UserError:  # not finished: nobody has fetched it
                continue
    items = (_cached(path) for path in sorted(folders) if path.name not in used)
    return [item for item in items if item.written < time.time() - days * DAY_S]


def _cached(folder: Path) -> Unused:
    entries = []
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        size = status.st_size if path.is_file() else 0
        entries.append(
            StoreEntry(f"{CACHE}{path.name}", size, max(status.st_atime, status.st_mtime) if size else status.st_mtime)
        )
    return Unused(
        f"{CACHE}{folder.name}", "no towers of this store; fetched again where they are needed", tuple(entries)
    )


def _run_at_work() -> str | None:
    """A run whose lock a process holds: those of this home have theirs here."""
    for path in sorted((home() / "locks").glob("*.lock")):
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                process, run = lock_holder(lock)
                return f"run {run or path.stem} (process {process})"
    return None
