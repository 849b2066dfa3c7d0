"""Towers as a pinned artifact, named by the digests of their files.

They are the frozen networks around the diffusion model.

FOLDER/vae/... text_encoder/... tokenizer/...       the files, as diffusers' StableDiffusion3Pipeline lays them out
FOLDER/TOWER.done.json                              a tower's files with sha256, and its training figures; written last
FOLDER/training.json                                every tower's figures
FOLDER/MANIFEST.<digest>.json, MANIFEST.json        all towers are there
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sd3core.data.checked_files import CheckedFiles
from sd3core.data.manifest import ManifestRef
from sd3core.data.provenance import Provenance, provenance_path, put_provenance
from sd3core.data.records import FileRecord, record_file
from sd3core.data.store import Store, StoreNotFound, canonical_json
from sd3core.errors import DataError
from sd3core.files.local_paths import expanded
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.specs import DONE, MANIFEST, fingerprint

DIFFUSERS_CHANNELS = 4  # of an AutoencoderKL whose config does not say
FETCH = ".fetch-"  # of a folder that a file is fetched into
ABANDONED_TOWER_S = 3600  # one that has not grown for so long has lost its process

TOWER_FOLDERS = {
    "vae": ("vae",),
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
    "judge": ("judge_text", "judge_vision", "judge_tokenizer"),
}


class TowerEntry(BaseModel):
    """One tower. `files` by their path under the artifact's folder; `digest` covers paths and contents, not the figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    files: dict[str, FileRecord]
    digest: str
    training: dict[str, Any] = {}


class TowersManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str = "towers"
    spec: str
    fields: dict[str, Any]
    folder: str
    towers: dict[str, TowerEntry]

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each tower by its name, as sd3core.specs wants them."""
        return {name: entry.digest for name, entry in self.towers.items()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for entry in self.towers.values() for file in entry.files.values())

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))


def commit_tower(
    store: Store,
    folder: str,
    name: str,
    local: Path,
    training: dict[str, Any],
    report: ProgressCallback = ignore_progress,
    pinned: TowerEntry | None = None,
) -> TowerEntry:
    """Puts a tower's folders from `local` into the store, the done record last.

    `pinned`: the entry of the damaged one that it is made again for, which stays. Raises DataError where it is another
    one: what the old one encoded would not fit it.
    """
    paths = sorted(
        path
        for part in TOWER_FOLDERS[name]
        for path in (local / part).rglob("*")
        if path.is_file() and path.name[0] != "."
    )
    files = {str(path.relative_to(local)): record_file(path) for path in paths}
    missing = [part for part in TOWER_FOLDERS[name] if not any(path.startswith(f"{part}/") for path in files)]
    if missing:
        raise DataError(f"tower {name}: {local / missing[0]} has no files")
    entry = TowerEntry(files=files, digest=_digest(files), training=training)
    if pinned is not None and entry.digest != pinned.digest:
        raise DataError(
            f"{store.uri(folder)}: tower {name} is damaged, and made again it is another one ({entry.digest[:12]}, not"
            f" {pinned.digest[:12]}); put its files back from a copy, or delete {name}.done.json there to take the new one: what"
            " the old one encoded is then made again"
        )
    meter = ProgressMeter(len(files), "files", report)
    for path in files:
        store.put_file(f"{folder}/{path}", local / path)
        meter.advance(note=path)
    entry = pinned or entry
    store.put(_done_path(folder, name), canonical_json(entry.model_dump(mode="json")))
    return entry


def finished_towers(store: Store, folder: str) -> dict[str, TowerEntry]:
    """The towers whose done record stands, by name."""
    finished = {}
    for name in TOWER_FOLDERS:
        try:
            finished[name] = _read_entry(store, folder, name)
        except StoreNotFound:
            continue
    return finished


def _read_entry(store: Store, folder: str, name: str) -> TowerEntry:
    """A damaged done record is written again from the manifest, where there is one."""
    path = _done_path(folder, name)
    try:
        entry = TowerEntry.model_validate_json(store.get(path))
        if entry.digest == _digest(entry.files):
            return entry
    except ValidationError:
        pass
    try:
        entry = read_towers(store, folder).towers[name]
    except (DataError, KeyError):
        raise DataError(
            f"{store.uri(path)}: damaged, or not of this version; delete it: the tower is made again"
        ) from None
    store.put(path, canonical_json(entry.model_dump(mode="json")))
    return entry


def damaged_towers(store: Store, folder: str, finished: dict[str, TowerEntry], checked: CheckedFiles) -> dict[str, str]:
    """Finished towers with a file that is gone or is not what was committed: name -> the first such file."""
    damaged: dict[str, str] = {}
    for name, entry in finished.items():
        for path, file in entry.files.items():
            if not checked.holds(store, f"{folder}/{path}", file):
                damaged.setdefault(name, path)
    return damaged


def commit_towers(
    store: Store, folder: str, fields: dict[str, Any], made_by: Provenance | None = None
) -> TowersManifest:
    """Writes the manifest over the finished towers. Raises DataError naming those that are not finished."""
    finished = finished_towers(store, folder)
    missing = [name for name in TOWER_FOLDERS if name not in finished]
    if missing:
        raise DataError(f"{store.uri(folder)}: towers not finished: {', '.join(missing)}; run the towers stage again")
    store.put_json(f"{folder}/training.json", {name: entry.training for name, entry in finished.items()})
    manifest = TowersManifest(spec=fingerprint(fields), fields=fields, folder=folder, towers=finished)
    if made_by is not None:
        put_provenance(store, provenance_path(folder, manifest.digest), made_by)
    store.put(ManifestRef(folder, manifest.digest).path, manifest.to_bytes())
    store.put(f"{folder}/{MANIFEST}", manifest.to_bytes())
    return manifest


def read_towers(store: Store, folder: str, digest: str | None = None) -> TowersManifest:
    """The towers manifest of a folder, or the one with `digest`. Raises DataError if it is missing, damaged or another one."""
    path = ManifestRef(folder, digest).path if digest else f"{folder}/{MANIFEST}"
    try:
        manifest = TowersManifest.model_validate_json(store.get(path))
    except StoreNotFound:
        raise DataError(f"{store.uri(path)}: no towers here; run the towers stage first") from None
    except ValidationError:
        raise DataError(
            f"{store.uri(path)}: not a towers manifest of this version; run the towers stage again"
        ) from None
    if digest is not None and manifest.digest != digest:
        raise DataError(
            f"{store.uri(path)}: not the towers that were asked for ({digest[:12]}); run the towers stage again"
        )
    if digest is None and not store.exists(ManifestRef(folder, manifest.digest).path):
        raise DataError(f"{store.uri(path)}: not the manifest that was committed; run the towers stage again")
    return manifest


def fetch_towers(
    store: Store,
    folder: str,
    local_cache: Path | str,
    only: Collection[str] | None = None,
    digest: str | None = None,
    report: ProgressCallback = ignore_progress,
    reread: bool = False,
) -> Path:
    """The towers (or those in `only`) as a local folder that the loaders open, every file as the manifest names it.

    Of several processes with one cache one fetches a tower, and the others wait for it. Files of a store on this machine are
    linked, not copied. Bytes are read and compared once a machine, and again where a file was changed; `reread` compares all of them now. A
    damaged copy is fetched again; DataError where the stored file itself is not what the manifest says.
    """
    manifest = read_towers(store, folder, digest)
    local, checked = Path(local_cache) / f"towers-{fingerprint(manifest.digests)}", checked_files(local_cache)
    wanted = {name: entry for name, entry in manifest.towers.items() if only is None or name in only}
    meter = ProgressMeter(sum(len(entry.files) for entry in wanted.values()), "files", report)
    for name, entry in wanted.items():
        with _one_at_a_time(local / f".{name}.lock"):
            for path, file in entry.files.items():
                if not checked.is_whole(local / path, file, reread=reread):
                    _fetch_file(store, f"{folder}/{path}", local / path, file, f"{name}{DONE}", checked)
        meter.advance(len(entry.files), name)
    return local


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Among the processes of this machine. The system frees the lock when its process ends, however it ends; where the cache's disk
    knows no locks, or may not be written, each goes on by itself: a file arrives whole in any case.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_vae_channels(config: bytes, channels: int, where: str) -> None:
    """Raises DataError unless an autoencoder's config.json says that its latents have the model's channels."""
    try:
        found = json.loads(config).get("latent_channels", DIFFUSERS_CHANNELS)
    except (ValueError, AttributeError):
        raise DataError(f"{where}: not the config.json of an autoencoder") from None
    if found != channels:
        raise DataError(
            f"{where}: latent_channels is {found}, the model takes latents of {channels} channels: name another VAE, as"
            " SD3's, or the model that was trained with this one"
        )


def check_vae_folder(folder: Path | str, channels: int) -> None:
    """`check_vae_channels` of a VAE's folder, or of a folder with one; what is not here is another check's."""
    folder = expanded(folder)
    path = (folder / "vae" if (folder / "vae").is_dir() else folder) / "config.json"
    if path.is_file():
        check_vae_channels(path.read_bytes(), channels, str(path))


def checked_files(local_cache: Path | str) -> CheckedFiles:
    return CheckedFiles(Path(local_cache) / "checked")


def _fetch_file(store: Store, path: str, target: Path, file: FileRecord, done: str, checked: CheckedFiles) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_fetches(target.parent)
    with tempfile.TemporaryDirectory(prefix=FETCH, dir=target.parent) as scratch:
        arrived = Path(scratch) / target.name
        standing = store.local_path(path)
        if standing is not None and standing.is_file():
            arrived.symlink_to(standing.resolve())
            whole = checked.is_whole(arrived, file, reread=True)
        else:
            whole = checked.fetch(store, path, arrived, file)
        if not whole:
            raise DataError(
                f"{store.uri(path)}: damaged, not the file that was committed; run the towers stage: it makes the tower"
                f" again; where it has seen that file whole before, and finds nothing to do, delete {done} there first"
            )
        os.replace(arrived, target)


def _remove_abandoned_fetches(folder: Path) -> None:
    """What a killed process left, up to a whole T5 each."""
    for scratch in folder.glob(f"{FETCH}*"):
        with suppress(OSError):  # another process removes it as well
            grew = max((entry.stat().st_mtime for entry in scratch.iterdir()), default=scratch.stat().st_mtime)
            if time.time() - grew > ABANDONED_TOWER_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _digest(files: dict[str, FileRecord]) -> str:
    return hashlib.sha256(canonical_json({path: file.sha256 for path, file in files.items()})).hexdigest()


def _done_path(folder: str, name: str) -> str:
    return f"{folder}/{name}{DONE}"
