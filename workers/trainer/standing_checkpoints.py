"""Says what stands of a phase: its last whole checkpoint and its loss rows.

Asking loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sd3core.checkpoint_record import (
    METRICS_FILE,
    CheckpointDone,
    CheckpointRef,
    DamagedRecord,
    list_checkpoints,
    read_checkpoint_done,
)
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.store import Store, StoreNotFound


def newest_attempt(store: Store, folder: str) -> int:
    numbers = (Path(entry.path).stem for entry in store.list(f"{folder}/attempts/"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def last_whole_checkpoint(
    store: Store,
    folder: str,
    warn: Callable[[str], None] = lambda message: None,
    last_samples: int | None = None,
    checked: CheckedFiles | None = None,
) -> CheckpointRef | None:
    """The last finished checkpoint whose files all stand in their sizes; `warn` hears of later ones that are passed over.

    Their bytes are compared by the ranks, each what it reads. `checked` compares them too, once a machine, where they lie on
    this one: nobody may read the last checkpoint of a finished phase. `last_samples`: where the phase ends that goes on from it.
    """
    for ref in reversed(list_checkpoints(store, folder, last_samples)):
        damaged = _damage(store, ref.folder, checked)
        if damaged is None:
            return ref
        warn(passed_over(damaged))
    return None


def passed_over(damage: str) -> str:
    return f"{damage}; going on from an earlier checkpoint"


def _damage(store: Store, folder: str, checked: CheckedFiles | None) -> str | None:
    """What of a checkpoint a listing and its record show not to be what was written, in words."""
    try:
        done = read_checkpoint_done(store, folder)
        damaged = damaged_files(store, folder, done)
        if checked and not damaged and store.local_path(folder) is not None:
            files = {f"{folder}/{name}": name for name in done.rank_files}
            changed = (name for path, name in files.items() if not checked.holds(store, path, done.files[name]))
            damaged = [f"{name} is damaged" for name in changed]
    except DamagedRecord as error:
        return error.damage
    return f"{store.uri(folder)}: {damaged[0]}" if damaged else None


def damaged_files(store: Store, folder: str, done: CheckpointDone) -> list[str]:
    """The files that training goes on from, by name and size, which a listing has. The loss rows are for the curve alone."""
    standing = {entry.path: entry.size for entry in store.list(f"{folder}/")}
    sizes = {name: (standing.get(f"{folder}/{name}"), done.files[name].bytes) for name in done.rank_files}
    return [
        f"{name} is missing" if size is None else f"{name} has {size:,} bytes instead of {expected:,}"
        for name, (size, expected) in sizes.items()
        if size != expected
    ]


def read_metrics(
    store: Store,
    folder: str,
    last_samples: int | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """The loss rows of a phase, from its first step to its last checkpoint, each step once.

    A checkpoint that a shorter run left between two others has rows that the later one has as well. Rows only draw a curve:
    what is left of a damaged file is read, and `warn` hears of the rest.
    """
    rows: list[dict[str, Any]] = []
    for ref in list_checkpoints(store, folder, last_samples):
        path = f"{ref.folder}/{METRICS_FILE}"
        found = _whole_rows(store, path)
        if not found or found[-1]["samples"] != ref.samples:
            warn(
                f"{store.uri(path)} is {'damaged' if store.exists(path) else 'missing'}: the loss curve has a gap up to"
                f" {ref.samples:,} samples, and nothing else needs it; TensorBoard's files in runs/RUN/logs have the losses"
            )
        rows += [row for row in found if not rows or row["samples"] > rows[-1]["samples"]]
    return rows


def _whole_rows(store: Store, path: str) -> list[dict[str, Any]]:
    """The rows before the first that cannot be read; none where there is no file."""
    rows: list[dict[str, Any]] = []
    with suppress(StoreNotFound, ValueError):  # no file; not UTF-8, not JSON
        for line in store.get(path).decode().splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not {"samples", "loss"} <= row.keys():
                break
            rows.append(row)
    return rows
