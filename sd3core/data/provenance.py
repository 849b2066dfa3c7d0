"""Provenance: by which version, packages and machine an object was made.

It stands beside the object or in a part that no fingerprint and no digest covers: the same bytes made elsewhere stay the
same. It names no host, no path and no user.

FOLDER/PROVENANCE.<digest>.json             of MANIFEST.<digest>.json, written before it
CHECKPOINT/provenance.attempt-0001.json     one of the checkpoint's files; DONE.json has its digest
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sd3core.data.store import Store, canonical_json
from sd3core.errors import StoreError
from sd3core.files.local_paths import PROJECT
from sd3core.specs import DONE_FILE, MANIFEST_COPY

DISTRIBUTION = "sd3-pipeline"
GIT_SECONDS = 10
CHECKPOINT_FILE = "provenance"
PROVENANCE_FILE = "PROVENANCE.json"  # of a folder that has one manifest
NAMED_PACKAGES = 10  # packages that are not as the lock has them


class Provenance(BaseModel):
    """What an object was made with. A reader of any version takes it: unknown keys are passed over, most may be missing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    commit: str | None = None  # of the project's checkout; None where it runs from none
    changed: bool = False  # files of the checkout differed from the commit
    lock: str | None = None  # infra/locks/VARIANT.txt with its SHA-256: "cpu 0123..."
    off_lock: list[str] = []  # packages that were not as the lock has them, the first few
    python: str = ""
    torch: str = ""
    device: str = ""  # kind of the devices: the GPU's or the CPU's model
    devices: int = 1  # ranks, or actors
    made: int | None = None  # shards, towers or samples that were made then; the others stood before
    seconds: float | None = None  # that this took

    def line(self) -> str:
        """Reads like "0.1.0 at 3631ae7d21c0, lock cpu 2f6d0c11a9be, 2 x Intel Xeon"."""
        at = f" at {self.commit[:12]}{' with changes' if self.changed else ''}" if self.commit else ""
        lock = f", lock {self.lock[:16]}{' with changes' if self.off_lock else ''}" if self.lock else ""
        return f"{self.version}{at}{lock}, {self.devices} x {self.device}"


def provenance(
    device: str | None = None, devices: int = 1, *, made: int | None = None, seconds: float | None = None
) -> Provenance:
    """What this process makes things with. `device`: from `device_kind`, where others than this process did the work."""
    rounded = None if seconds is None else round(seconds, 1)
    return Provenance(**_of_this_process(), device=device or device_kind(), devices=devices, made=made, seconds=rounded)


def device_kind(device_type: str = "cpu") -> str:
    """The model of this process's CPU or GPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return _cpu_model()


def provenance_path(folder: str, digest: str) -> str:
    """Where the provenance of the manifest with this digest stands."""
    return f"{folder}/PROVENANCE.{digest[:12]}.json"


def provenance_file(attempt: int) -> str:
    """The provenance's name in a checkpoint: a late writer of an older attempt does not touch a newer one's bytes."""
    return f"{CHECKPOINT_FILE}.attempt-{attempt:04d}.json"


def provenance_bytes(made_by: Provenance) -> bytes:
    return canonical_json(made_by.model_dump(mode="json", exclude_none=True))


def put_provenance(store: Store, path: str, made_by: Provenance) -> None:
    store.put(path, provenance_bytes(made_by))


def provenance_of(store: Store, path: str) -> list[Provenance]:
    """Who made what this record stands for: a manifest, a checkpoint's DONE.json, scores.json. Empty where nobody kept it."""
    folder, _, name = path.rpartition("/")
    try:
        if name.startswith(MANIFEST_COPY):
            beside = [f"{folder}/{name.replace('MANIFEST', 'PROVENANCE', 1)}"]
        elif name == DONE_FILE:
            files = store.get_json(path)["files"]
            beside = [f"{folder}/{file}" for file in sorted(files) if file.startswith(CHECKPOINT_FILE)]
        else:
            return [Provenance.model_validate(fields) for fields in store.get_json(path).get("made_by", [])]
    except (StoreError, ValidationError, KeyError, AttributeError, TypeError):
        return []
    return [found for found in (read_provenance(store, one) for one in beside) if found is not None]


def read_provenance(store: Store, path: str) -> Provenance | None:
    """None of what was made before it was kept, or where it cannot be read: it explains, and decides nothing."""
    try:
        return Provenance.model_validate(store.get_json(path))
    except (StoreError, ValidationError):
        return None


@cache
def _of_this_process() -> dict[str, object]:
    version = _installed_version("torch") or ""
    variant = "cpu" if version.endswith("+cpu") else "cuda"
    commit, changed = _checkout()
    lock = PROJECT / "infra" / "locks" / f"{variant}.txt"
    digest, off_lock = _compare_with_lock(lock.read_text(encoding="utf-8")) if lock.is_file() else (None, [])
    return {
        "version": _installed_version(DISTRIBUTION) or "not installed",
        "commit": commit,
        "changed": changed,
        "lock": digest and f"{variant} {digest}",
        "off_lock": off_lock,
        "python": platform.python_version(),
        "torch": version,
    }


def _compare_with_lock(lock: str) -> tuple[str, list[str]]:
    """The lock's SHA-256, and the first of its packages that are installed otherwise. Two builds of a version are one."""
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", lock, re.MULTILINE)
    installed = ((name, wanted, _installed_version(name) or "missing") for name, wanted in pinned)
    other = [f"{name} {found}" for name, wanted, found in installed if found.partition("+")[0] != wanted]
    return hashlib.sha256(lock.encode()).hexdigest(), other[:NAMED_PACKAGES]


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _checkout() -> tuple[str | None, bool]:
    """The commit of the project's own checkout, and whether its tracked files were changed; a repository around it is another's."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != PROJECT:
        return None, False
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    """What git answers; None where it cannot. A GIT_DIR of the shell would speak of another repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(PROJECT), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _cpu_model() -> str:
    """The processor's model by the kernel; the architecture where it names none, as on ARM."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()
