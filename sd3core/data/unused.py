"""What a store holds that no run uses any more: specs, shards, towers, references, checkpoints and exports that were superseded.

Used is what the store itself says, whoever made it and on whatever machine: what a run's notes name, the manifests that these were
made from, what finished checkpoints and scores name, and where another run starts from. What was written lately is never
unused: a run at work on another machine has not noted it yet. Only folders of this project's layout are looked at.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sd3core.data.manifest import MANIFEST, Manifest, manifest_ref, read_manifest
from sd3core.data.shards import DONE
from sd3core.data.store import Store, StoreEntry, StoreNotFound
from sd3core.errors import DataError, StoreError

DATA_STAGES = ("raw", "captions", "text", "latents")
SPEC = re.compile(r"[0-9a-f]{12}")
STEM = re.compile(r"(\d{5,}\.[0-9a-f]{12})\.")
DIGEST = re.compile(r"[0-9a-f]{64}")
SAFE_DAYS = 7.0  # what is younger may be of a run that has not noted it
ENDING = "/shards"  # of the name of what lies unused in a folder that is used


@dataclass(frozen=True)
class Unused:
    """`name`: a folder of the store, or FOLDER/shards for shards that no manifest of a used folder names."""

    name: str
    why: str
    entries: tuple[StoreEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def written(self) -> float:
        return max((entry.modified for entry in self.entries), default=0.0)


@dataclass
class _Uses:
    """What runs name, gathered from their records."""

    folders: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)  # of manifests
    specs: set[str] = field(default_factory=set)  # of references
    phases: dict[str, str] = field(default_factory=dict)  # runs/RUN/checkpoints/PHASE -> the folder that its note names
    texts: list[str] = field(default_factory=list)  # starts and exports, as URLs or paths

    def names(self, folder: str) -> bool:
        return folder in self.folders or any(folder in text for text in self.texts)


def find_unused(store: Store, days: float = SAFE_DAYS) -> list[Unused]:
    """Everything of the store that no run uses and nobody has written to for so many days, by name."""
    before = time.time() - days * 24 * 3600
    uses = _uses(store)
    found = [*_unused_data(store, uses), *_unused_towers(store, uses), *_unused_of_runs(store, uses)]
    return sorted((item for item in found if item.entries and item.written < before), key=lambda item: item.name)


def remove(store: Store, item: Unused) -> None:
    """Removes the words that something is done first: killed at any moment, nothing half is taken for whole."""
    for entry in sorted(item.entries, key=lambda entry: (_rank(entry.path), entry.path)):
        store.delete(entry.path)


def _rank(path: str) -> int:
    name = path.rpartition("/")[2]
    if name in (MANIFEST, "DONE.json"):
        return 0
    return 1 if name.startswith("MANIFEST.") or name.endswith(DONE) else 2


def _uses(store: Store) -> _Uses:
    uses = _Uses()
    for run in store.folders("runs"):
        for entry in store.list(f"runs/{run}/stages"):
            note = _json(store, entry.path)
            folder, stage = str(note.get("folder", "")), entry.path.rpartition("/")[2].removesuffix(".json")
            uses.folders.add(folder)
            uses.digests.add(str(note.get("digest", "")))
            _gather(note.get("fields"), uses)
            if folder.startswith(f"runs/{run}/checkpoints/"):
                uses.phases[f"runs/{run}/checkpoints/{stage}"] = folder
        for name in ("evaluations/scores.json", "summary.json"):
            record = _json(store, f"runs/{run}/{name}")
            _gather(record.get("protocols"), uses)
            _gather(record.get("stages"), uses)
            uses.texts += [str(stage.get("manifest", "")) for stage in record.get("stages") or [] if isinstance(stage, dict)]
        for phase in store.folders(f"runs/{run}/checkpoints"):
            for entry in store.list(f"runs/{run}/checkpoints/{phase}"):
                if entry.path.endswith("/DONE.json"):
                    done = _json(store, entry.path)
                    _gather(done.get("specs"), uses)
                    uses.texts.append(str(((done.get("recipe") or {}).get("model") or {}).get("start_from") or ""))
    uses.folders.discard("")
    return uses


def _gather(value: Any, uses: _Uses) -> None:
    """Every digest and every spec among the values, however deep they lie."""
    if isinstance(value, dict):
        for inner in value.values():
            _gather(inner, uses)
    elif isinstance(value, list):
        for inner in value:
            _gather(inner, uses)
    elif isinstance(value, str):
        if DIGEST.fullmatch(value):
            uses.digests.add(value)
        elif SPEC.fullmatch(value):
            uses.specs.add(value)


def _json(store: Store, path: str) -> dict[str, Any]:
    """{} for what is not there; what is there and cannot be read is an error: nothing may be removed by a guess."""
    try:
        value = store.get_json(path)
    except StoreNotFound:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{store.uri(path)}: not a record of this project; delete it, and run this again")
    return value


def _unused_data(store: Store, uses: _Uses) -> Iterator[Unused]:
    folders = {
        f"datasets/{name}/{stage}/{spec}": stage
        for name in store.folders("datasets")
        for stage in DATA_STAGES
        for spec in store.folders(f"datasets/{name}/{stage}")
        if SPEC.fullmatch(spec)
    }
    used: dict[str, list[Manifest]] = {}
    for folder in sorted(folders, key=lambda folder: -DATA_STAGES.index(folders[folder])):  # a stage's inputs come before it
        manifests = _used_manifests(store, folder, uses)
        if manifests is not None:
            used[folder] = manifests
            for manifest in manifests:
                _gather([manifest.inputs, manifest.fields], uses)
    for folder in folders:
        entries = store.list(folder)
        if folder not in used:
            yield Unused(folder, "no run's notes, checkpoints or scores name it", tuple(entries))
        elif used[folder]:
            stems = {shard.stem for manifest in used[folder] for shard in manifest.shards}
            yield Unused(f"{folder}{ENDING}", "shards that no manifest in use names", tuple(_other_shards(folder, entries, stems)))


def _used_manifests(store: Store, folder: str, uses: _Uses) -> list[Manifest] | None:
    """Those of a folder's manifests that something names, and with them, or where a note names the folder, the newest.

    None of a folder that nothing names. [] where one of them cannot be read: what it names is not known, so all stays.
    """
    copies = {manifest_ref(folder, digest).path for digest in uses.digests if DIGEST.fullmatch(digest)}
    standing = [entry.path for entry in store.list(folder) if entry.path.rpartition("/")[2].startswith("MANIFEST.")]
    named = [path for path in standing if path in copies]
    if not named and not uses.names(folder):
        return None
    try:
        return [read_manifest(store, path) for path in standing if path in named or path == f"{folder}/{MANIFEST}"]
    except (DataError, StoreError):
        return []


def _other_shards(folder: str, entries: Iterable[StoreEntry], stems: set[str]) -> Iterator[StoreEntry]:
    for entry in entries:
        shard = STEM.match(entry.path[len(folder) + 1 :])
        if shard and shard.group(1) not in stems:
            yield entry


def _unused_towers(store: Store, uses: _Uses) -> Iterator[Unused]:
    for name in store.folders("towers"):
        for spec in filter(SPEC.fullmatch, store.folders(f"towers/{name}")):
            folder = f"towers/{name}/{spec}"
            digests = _tower_digests(store, folder)
            if not uses.names(folder) and not digests & uses.digests:
                yield Unused(folder, "no run's notes, checkpoints or scores name it", tuple(store.list(folder)))
    for name in store.folders("references"):
        for spec in filter(SPEC.fullmatch, store.folders(f"references/{name}")):
            if spec not in uses.specs:
                folder = f"references/{name}/{spec}"
                yield Unused(folder, "no run's scores name it; it is made again from the images", tuple(store.list(folder)))


def _tower_digests(store: Store, folder: str) -> set[str]:
    towers = _json(store, f"{folder}/{MANIFEST}").get("towers") or {}
    return {str(tower.get("digest")) for tower in towers.values() if isinstance(tower, dict)}


def _unused_of_runs(store: Store, uses: _Uses) -> Iterator[Unused]:
    """Of a run that went on under another spec: the older checkpoints with what was logged and drawn, and older exports."""
    for run in store.folders("runs"):
        for phase in store.folders(f"runs/{run}/checkpoints"):
            parent = f"runs/{run}/checkpoints/{phase}"
            for spec in filter(SPEC.fullmatch, store.folders(parent)):
                folder = f"{parent}/{spec}"
                if parent in uses.phases and not uses.names(folder):
                    beside = [entry for kind in ("logs", "previews") for entry in store.list(f"runs/{run}/{kind}/{phase}-{spec}")]
                    why = f"{phase} was trained again since, in {uses.phases[parent].rpartition('/')[2]}"
                    yield Unused(folder, why, (*store.list(folder), *beside))
        named = any(f"runs/{run}/export/" in text for text in uses.texts)
        for spec in filter(SPEC.fullmatch, store.folders(f"runs/{run}/export")):
            folder = f"runs/{run}/export/{spec}"
            if named and not uses.names(folder):
                yield Unused(folder, "the run's summary names a newer one", tuple(store.list(folder)))
        records = ("stages", "checkpoints", "evaluations", "export")
        if not any(store.list(f"runs/{run}/{name}") for name in records) and not store.exists(f"runs/{run}/summary.json"):
            yield Unused(f"runs/{run}", "nothing of it came to an end", tuple(store.list(f"runs/{run}")))
