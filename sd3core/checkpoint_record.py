"""Records of training checkpoints: which stand, and what each says of itself.

Reading them loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sd3core.backbone_config import BackboneConfig, config_from_dict
from sd3core.data.records import FileRecord, own_digest, sealed
from sd3core.data.store import Store, StoreNotFound
from sd3core.errors import CheckpointError
from sd3core.specs import DONE_FILE

CHECKPOINT_FORMAT = 1  # raise it when a reader of today could not read what is written
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"  # of a plain model folder, its record


class DamagedFile(CheckpointError):
    """A file of a checkpoint that is gone, or is not what was written. Says what, then what mends it."""

    @property
    def damage(self) -> str:
        return str(self).partition("; ")[0]


class DamagedRecord(DamagedFile):
    """A DONE.json whose content is not what was written."""


class CheckpointDone(BaseModel):
    """What DONE.json says: all that is needed to go on from here, at any world size, or to make a model of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = CHECKPOINT_FORMAT
    samples: int  # seen so far: the clock
    steps: int  # taken so far, of the global batch
    attempt: int  # of the training that wrote it: an older attempt must not commit after a newer one
    optimizer_step: int  # Adam's bias correction; behind `steps` when steps were skipped
    config: dict[str, Any]  # BackboneConfig.to_dict()
    training: dict[str, Any]  # the recipe's training phase
    parameters: dict[str, list[int]]  # name -> shape, every trained parameter
    files: dict[str, FileRecord]  # every file but DONE.json
    specs: dict[str, str]  # fingerprints and manifest digests it was trained from
    null: Literal["zeros", "empty"]  # what the model knows as "no prompt"
    recipe: dict[str, Any] | None = None
    sha256: str | None = None  # of all of this file besides; None where an earlier version wrote it

    def model_config_of(self) -> BackboneConfig:
        return config_from_dict(self.config)

    @property
    def rank_files(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    @property
    def digest(self) -> str:
        """SHA-256 that names the content by what it was made from: the specs (all that training depends on), and when.

        Equal jobs give equal checkpoints, so restarts, ranks and settings outside the specs change nothing here. Floats
        may differ in their last bits under one digest; `files` pins the bytes.
        """
        made_otherwise = {"attempt", "files", "recipe", "training", "sha256"}
        fields = self.model_dump(mode="json", exclude=made_otherwise)
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class CheckpointRef:
    samples: int
    folder: str


def checkpoint_folder(parent: str, samples: int) -> str:
    return f"{parent.rstrip('/')}/{samples:012d}"


def list_checkpoints(store: Store, parent: str, last_samples: int | None = None) -> list[CheckpointRef]:
    """The finished checkpoints of one training phase, fewest samples first. One listing.

    `last_samples`: of a phase that ends there; without it also those of a longer one, which share the folder.
    """
    pattern = re.compile(re.escape(parent.rstrip("/")) + rf"/(\d{{12}})/{DONE_FILE}")
    matches = (pattern.fullmatch(entry.path) for entry in store.list(parent.rstrip("/") + "/"))
    samples = sorted(int(match.group(1)) for match in matches if match)
    return [
        CheckpointRef(n, checkpoint_folder(parent, n)) for n in samples if last_samples is None or n <= last_samples
    ]


def write_done(store: Store, folder: str, done: CheckpointDone) -> None:
    """Writes DONE.json, which makes the checkpoint exist. It vouches for the files, and for itself."""
    store.put_json(path_in(folder, DONE_FILE), sealed(done.model_dump(mode="json")))


def read_checkpoint_done(store: Store, folder: str) -> CheckpointDone:
    """Raises CheckpointError where there is none or another version wrote it, DamagedRecord where it is damaged."""
    path = path_in(folder, DONE_FILE)
    where = store.uri(path)
    try:
        data = store.get(path)
    except StoreNotFound:
        raise CheckpointError(f"{where} is missing: the checkpoint was not finished; take an earlier one") from None
    mend = "delete it, and run the training stage again: it goes on from an earlier checkpoint"
    try:
        fields = json.loads(data)
        stated = fields.get("sha256")
    except (ValueError, AttributeError, TypeError):
        raise DamagedRecord(f"{where}: damaged, not JSON; {mend}") from None
    if stated is not None and stated != own_digest(fields):
        raise DamagedRecord(f"{where}: damaged, its content is not what was written; {mend}")
    try:
        done = CheckpointDone.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if done.format != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{where}: format {done.format}; this version reads {CHECKPOINT_FORMAT}")
    named = where.split("/")[
        -2
    ]  # older records do not vouch for themselves, and the clock is what training goes on from
    if re.fullmatch(r"\d{12}", named) and int(named) != done.samples:
        raise DamagedRecord(f"{where}: damaged, it says {done.samples:,} samples and its folder {int(named):,}; {mend}")
    return done


def path_in(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name
