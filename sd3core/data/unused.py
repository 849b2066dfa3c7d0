"""Finds what a store holds that no run uses any more.

These are specs, shards, towers, references, checkpoints and exports that were superseded.

Used is what the store itself says, whoever made it and on whatever machine: what a run's notes name, the manifests that these were
made from, what finished checkpoints and scores name, where another run starts from, and what a run that has begun says it needs.
What was written lately is never unused. What may be half of something is unfinished: it is named, and goes by its own name alone.
Only folders of this project's layout are looked at: each is listed once, and no shard is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sd3core.data.begun import Begun, all_begun
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.store import Store, StoreEntry, StoreNotFound
from sd3core.errors import DataError, StoreError
from sd3core.specs import (
    BEGUN,
    DATA_STAGES,
    DATASETS,
    DONE,
    DONE_FILE,
    MANIFEST,
    MANIFEST_COPY,
    REFERENCES,
    RUNS,
    TOWERS,
    data_folder,
    exports_folder,
    logs_folder,
    phase_folder,
    previews_folder,
    run_folder,
    scores_path,
    summary_path,
)
from sd3core.words import DAY_S

SPEC = re.compile(r"[0-9a-f]{12}")
STEM = re.compile(r"(\d{5,}\.[0-9a-f]{12})\.")
DIGEST = re.compile(r"[0-9a-f]{64}")
# a training's folder, or an export's
OF_RUN = re.compile(rf"({phase_folder('[^/]+', '[^/]+')}|{exports_folder('[^/]+')})/([0-9a-f]{{12}})(?=/|$)")
SAFE_DAYS = 7.0  # what is younger may be of a run that has not noted it
SHARDS, UNFINISHED = "/shards", "/unfinished"  # of the names of what lies in a folder that is used
GOES_ON = "where a run was interrupted, the same command goes on with it"
NOBODYS = "no run's notes, checkpoints or scores name it"


@dataclass(frozen=True)
class Unused:
    """`name`: a folder of the store, or FOLDER/shards for shards that only manifests of no use name, or FOLDER/unfinished for
    those that none names yet. `unfinished`: a run may go on with it.
    """

    name: str
    why: str
    entries: tuple[StoreEntry, ...]
    unfinished: bool = False

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def written(self) -> float:
        return _newest(self.entries)


@dataclass
class _Uses:
    """What runs name, gathered from their records."""

    folders: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)  # of manifests
    specs: set[str] = field(default_factory=set)  # of references
    texts: list[str] = field(default_factory=list)  # starts, needs and exports, as URLs or paths
    # by folder, until an item names them
    begun: dict[str, list[Begun]] = field(default_factory=lambda: defaultdict(list))
    written: dict[str, float] = field(default_factory=dict)  # by run: when anything of it was

    def names(self, folder: str) -> bool:
        return folder in self.folders or any(folder in text for text in self.texts)

    def copies(self, folder: str) -> set[str]:
        """Where the manifests that are named would stand in this folder."""
        return {ManifestRef(folder, digest).path for digest in self.digests if DIGEST.fullmatch(digest)}

    def item(self, name: str, why: str, entries: Iterable[StoreEntry], doubt: bool = False, folder: str = "") -> Unused:
        """Unfinished where there is a doubt, or a run has begun the folder and not ended."""
        begun = self.begun.pop(folder or name, [])
        why = "; ".join(each.line for each in begun) or why
        doubt = doubt or bool(begun)
        entries = (*entries, *(each.entry for each in begun))
        return Unused(name, f"unfinished: {why}" if doubt else why, entries, doubt)


def find_unused(store: Store, days: float = SAFE_DAYS) -> list[Unused]:
    """Everything of the store that no run uses and nobody has written to for so many days by the store's clock, by name."""
    before = store.now() - days * DAY_S
    uses = _uses_of_begun(store)
    of_runs = [part for run in store.folders(RUNS) for part in _look_at_run(store, run, uses)]
    found = [*_unused_data(store, uses), *_unused_towers(store, uses)]
    found += [uses.item(folder, *rest) for folder, *rest in of_runs if not uses.names(folder)]
    for folder, begun in [*uses.begun.items()]:  # in a folder that is used, or that has nothing in it
        if all(uses.written.get(each.run, 0.0) < before for each in begun):
            found.append(uses.item(f"{folder}{UNFINISHED}", "", (), folder=folder))
    return sorted((item for item in found if item.entries and item.written < before), key=lambda item: item.name)


def remove(store: Store, item: Unused) -> bool:
    """Removes the words that something is done first, and what tells that it was once whole, or has begun, last: killed at any
    moment, nothing half is taken for whole. False, and nothing goes, where a run has begun with what was unused.
    """
    uses = _uses_of_begun(store)
    folder = item.name.removesuffix(SHARDS)
    begun = folder in uses.begun or uses.names(folder) or uses.copies(folder) & {entry.path for entry in item.entries}
    if begun and not item.unfinished:
        return False
    ranks = defaultdict(list)
    for entry in item.entries:
        ranks[_rank(entry.path)].append(entry.path)
    for rank in sorted(ranks):
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(store.delete, ranks[rank]))
    return True


def _rank(path: str) -> int:
    name = path.rpartition("/")[2]
    if name in (MANIFEST, DONE_FILE):
        return 0
    if name.endswith(DONE):
        return 1
    return 3 if name.startswith(MANIFEST_COPY) or path.startswith(f"{BEGUN}/") else 2


def _newest(entries: Iterable[StoreEntry]) -> float:
    return max((entry.modified for entry in entries), default=0.0)


def _uses_of_begun(store: Store) -> _Uses:
    uses = _Uses()
    for begun in all_begun(store):
        uses.begun[begun.folder].append(begun)
        _gather(begun.record.get("fields"), uses)
        uses.texts += map(str, begun.record.get("needs") or [])
    return uses


def _look_at_run(store: Store, run: str, uses: _Uses) -> list[tuple[str, str, list[StoreEntry], bool]]:
    """Gathers what a run's records name. Returns folder, why, objects and doubt of what its own notes have superseded."""
    entries = store.list(run_folder(run))
    uses.written[run] = _newest(entries)
    noted = _gather_records(store, run, entries, uses)
    parts: dict[str, list[StoreEntry]] = defaultdict(list)
    for entry in entries:
        if part := OF_RUN.match(entry.path):
            parts[part[0]].append(entry)
    found = []
    for folder, inside in parts.items():
        parent, _, spec = folder.rpartition("/")
        _gather_checkpoint(store, inside, uses)
        last, when = noted.get(parent, ("", 0.0))
        if folder == last or not (last or folder in uses.begun):
            continue
        phase = "" if parent.endswith("/export") else parent.rpartition("/")[2]
        done = f"{phase} was trained again" if phase else "the model was exported again"
        since, last = _newest(inside), last.rpartition("/")[2]
        why = (
            f"{done} since, in {last}"
            if since < when
            else f"written to after {last}, which is the last that is noted; {GOES_ON}"
        )
        at_work = run_folder(run) in uses.begun  # of which home, and with which settings, is not known
        why += "; a pipeline of this run has begun and not ended" if at_work else ""
        beside = (f"{logs_folder(run, phase, spec)}/", f"{previews_folder(run, phase, spec)}/")
        inside += [entry for entry in entries if phase and entry.path.startswith(beside)]
        found.append((folder, why, inside, at_work or since >= when))
    ends = tuple(
        run_folder(run, name) for name in ("stages/", "checkpoints/", "evaluations/", "export/", "summary.json")
    )
    if not any(entry.path.startswith(ends) for entry in entries):
        begun = any(each.run == run for several in uses.begun.values() for each in several)
        found.append((run_folder(run), "nothing of it came to an end", entries, begun))
    return found


def _gather_records(store: Store, run: str, entries: list[StoreEntry], uses: _Uses) -> dict[str, tuple[str, float]]:
    """The folder that was noted last for each phase and for the exports, and when."""
    noted: dict[str, tuple[str, float]] = {}
    for entry in entries:
        is_note = entry.path.startswith(run_folder(run, "stages/"))
        if not is_note and entry.path not in (summary_path(run), scores_path(run)):
            continue
        record = _json(store, entry.path)
        for name in ("digest", "fields", "protocols", "stages"):
            _gather(record.get(name), uses)
        folder = str(record.get("folder") or "")
        uses.folders |= {folder} - {""}
        manifests = [str(stage.get("manifest", "")) for stage in record.get("stages") or [] if isinstance(stage, dict)]
        uses.texts += manifests
        for part in filter(None, map(OF_RUN.search, [folder, *manifests])):
            newer = entry.modified >= noted.get(part[1], ("", 0.0))[1]
            # a summary is written again where nothing was trained
            if newer and (is_note or part[1].endswith("/export")):
                noted[part[1]] = (part[0], entry.modified)
    return noted


def _gather_checkpoint(store: Store, entries: list[StoreEntry], uses: _Uses) -> None:
    """Gathers what one training's newest checkpoint names: the others were made from the same."""
    finished = [entry.path for entry in entries if entry.path.endswith(f"/{DONE_FILE}")]
    if finished:
        done = _json(store, max(finished))
        _gather(done.get("specs"), uses)
        uses.texts.append(str(((done.get("recipe") or {}).get("model") or {}).get("start_from") or ""))


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
    names = store.folders(DATASETS)
    for stage in reversed(DATA_STAGES):  # what a stage was made from comes after it
        for name in names:
            for spec in filter(SPEC.fullmatch, store.folders(data_folder(name, stage))):
                yield from _unused_in(store, data_folder(name, stage, spec), uses)


def _unused_in(store: Store, folder: str, uses: _Uses) -> Iterator[Unused]:
    entries = store.list(folder)
    standing = {
        entry.path: entry.modified for entry in entries if entry.path.rpartition("/")[2].startswith(MANIFEST_COPY)
    }
    named = standing.keys() & uses.copies(folder)
    if not named and not uses.names(folder):
        committed = max(standing.values(), default=0.0)
        later = not standing or any(entry.path.endswith(DONE) and entry.modified > committed for entry in entries)
        yield uses.item(folder, f"shards without a manifest; {GOES_ON}" if later else NOBODYS, entries, doubt=later)
        return
    try:
        manifests = [read_manifest(store, path) for path in standing if path in named or path == f"{folder}/{MANIFEST}"]
    except (DataError, StoreError):
        return  # what it names is not known: all stays
    for manifest in manifests:
        _gather([manifest.inputs, manifest.fields], uses)
    if not manifests:
        return  # taken back by --from-stage, or its first run is at work
    stems = {shard.stem for manifest in manifests for shard in manifest.shards}
    others = [
        (stem[1], entry)
        for entry in entries
        if (stem := STEM.match(entry.path[len(folder) + 1 :])) and stem[1] not in stems
    ]
    older = set()
    if folder not in uses.begun:  # else the run may go back to them
        older = _stems_named(store, sorted(standing.keys() - named), {stem for stem, _ in others})
    yield Unused(
        f"{folder}{SHARDS}",
        "shards that no manifest in use names",
        tuple(entry for stem, entry in others if stem in older),
    )
    if unknown := [entry for stem, entry in others if stem not in older]:
        yield uses.item(
            f"{folder}{UNFINISHED}", f"shards that no manifest names; {GOES_ON}", unknown, doubt=True, folder=folder
        )


def _stems_named(store: Store, manifests: Iterable[str], wanted: set[str]) -> set[str]:
    """Which of these shards one of these manifests names; what cannot be read names none."""
    named: set[str] = set()
    for path in manifests:
        if wanted <= named:
            break
        with suppress(DataError, StoreError):
            named |= {shard.stem for shard in read_manifest(store, path).shards}
    return named


def _unused_towers(store: Store, uses: _Uses) -> Iterator[Unused]:
    for folder in _spec_folders(store, TOWERS):
        entries = store.list(folder)
        whole = any(entry.path.startswith(f"{folder}/{MANIFEST_COPY}") for entry in entries)
        if not uses.names(folder) and not _tower_digests(store, folder) & uses.digests:
            yield uses.item(
                folder, NOBODYS if whole else f"towers without a manifest; {GOES_ON}", entries, doubt=not whole
            )
    for folder in _spec_folders(store, REFERENCES):
        if folder.rpartition("/")[2] not in uses.specs:
            begun = folder.rpartition("/")[0] in uses.texts
            why = "; an evaluation of such images has begun and not ended" if begun else ""
            why = f"no run's scores name it, and it is made again from the images{why}"
            yield uses.item(folder, why, store.list(folder), doubt=begun)


def _spec_folders(store: Store, parent: str) -> Iterator[str]:
    for name in store.folders(parent):
        yield from (f"{parent}/{name}/{spec}" for spec in store.folders(f"{parent}/{name}") if SPEC.fullmatch(spec))


def _tower_digests(store: Store, folder: str) -> set[str]:
    towers = _json(store, f"{folder}/{MANIFEST}").get("towers") or {}
    return {str(tower.get("digest")) for tower in towers.values() if isinstance(tower, dict)}
