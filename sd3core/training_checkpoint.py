"""Reads and writes training checkpoints: the record, and the ranks' pieces.

FOLDER/000000012800/ (samples seen)
    rank-000-of-002.safetensors    flat fp32 pieces "KIND/PARAMETER/START" of the tensors, each element once
    metrics.jsonl                  a row per logged step since the checkpoint before
    DONE.json                      `CheckpointDone`, last: without it the checkpoint does not exist

The format knows neither world size nor ZeRO stage, so it loads under any other. safetensors and JSON only, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sd3core.data.records import FileRecord, own_digest, record_file, sealed
from sd3core.data.store import Store, StoreNotFound
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import TensorFiles
from sd3core.mmdit import BackboneConfig, config_from_dict
from sd3core.specs import DONE_FILE

CHECKPOINT_FORMAT = 1  # raise it when a reader of today could not read what is written
TENSOR_KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
TensorKind = Literal["weights", "exp_avg", "exp_avg_sq", "ema"]
METRICS_FILE = "metrics.jsonl"


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


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + len(values) of one kind of state of a parameter, flattened."""

    kind: TensorKind
    parameter: str
    start: int
    values: Tensor  # (n,) float32

    @property
    def stop(self) -> int:
        return self.start + len(self.values)

    @property
    def name(self) -> str:
        """In its file."""
        return piece_name(self.kind, self.parameter, self.start)


def checkpoint_folder(parent: str, samples: int) -> str:
    return f"{parent.rstrip('/')}/{samples:012d}"


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:03d}-of-{world_size:03d}.safetensors"


def piece_name(kind: TensorKind, parameter: str, start: int) -> str:
    return f"{kind}/{parameter}/{start}"


def parse_piece_name(name: str) -> tuple[TensorKind, str, int]:
    kind, _, rest = name.partition("/")
    parameter, _, start = rest.rpartition("/")
    if kind not in TENSOR_KINDS or not parameter or not start.isdigit():
        raise CheckpointError(
            f"tensor {name!r} is not named KIND/PARAMETER/START with KIND one of {', '.join(TENSOR_KINDS)}"
        )
    return kind, parameter, int(start)


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
    store.put_json(_join(folder, DONE_FILE), sealed(done.model_dump(mode="json")))


def read_checkpoint_done(store: Store, folder: str) -> CheckpointDone:
    """Raises CheckpointError where there is none or another version wrote it, DamagedRecord where it is damaged."""
    path = _join(folder, DONE_FILE)
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


def read_pieces(
    store: Store,
    folder: str,
    done: CheckpointDone,
    wanted: Callable[[TensorKind, str, int, int], bool] = lambda kind, parameter, start, stop: True,
    files: Sequence[str] | None = None,
) -> Iterator[Piece]:
    """Every piece for which `wanted(kind, parameter, start, stop)`, of those rank files or of all; each file's digest is
    checked first, and other pieces are not read from it.

    Raises DamagedFile, or CheckpointError that names a tensor.
    """
    record = store.uri(_join(folder, DONE_FILE))
    mend = (
        f"take another checkpoint, or delete {record} and run the training stage again: it goes on from an earlier one"
    )
    for name in done.rank_files if files is None else files:
        verified = verified_local_file(store, _join(folder, name), done.files[name], mend)
        with verified as path, TensorFiles([path]) as tensors:
            for key, info in tensors.infos.items():
                kind, parameter, start = parse_piece_name(key)
                if wanted(kind, parameter, start, start + info.elements):
                    yield Piece(kind, parameter, start, tensors[key])


def read_kind(store: Store, folder: str, done: CheckpointDone, kind: TensorKind) -> Iterator[Piece]:
    """Every piece of one kind, as the ranks wrote them; holds one of them at a time.

    Raises CheckpointError, at the latest after the last piece, unless they cover every element of every parameter once.
    """
    where = store.uri(folder) if folder else store.url
    sizes = {name: math.prod(shape) for name, shape in done.parameters.items()}
    covered: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for piece in read_pieces(store, folder, done, lambda k, *_: k == kind):
        if piece.parameter not in sizes or piece.stop > sizes[piece.parameter]:
            raise CheckpointError(f"{where}: piece {piece.name} lies outside the parameters of {DONE_FILE}")
        covered[piece.parameter].append((piece.start, piece.stop))
        yield piece
    for name, spans in covered.items():
        _check_covered(where, kind, name, sorted(spans), sizes[name])


def assemble_weights(
    store: Store, folder: str, kind: TensorKind, done: CheckpointDone | None = None
) -> dict[str, Tensor]:
    """One kind of tensor of every parameter, whole, float32. `done`: the record, where it was read already.

    Raises CheckpointError unless the pieces cover every element of every parameter exactly once.
    """
    done = done or read_checkpoint_done(store, folder)
    shapes = done.parameters
    flat = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    for piece in read_kind(store, folder, done, kind):
        flat[piece.parameter][piece.start : piece.stop] = piece.values
    return {name: flat[name].view(shape) for name, shape in shapes.items()}


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _check_covered(where: str, kind: TensorKind, name: str, spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for start, stop in [*spans, (size, size)]:
        if start != position:
            problem = "missing" if start > position else "stored twice"
            low, high = min(position, start), max(position, start)
            span = f"elements {low} to {high} of {kind}/{name}"
            raise CheckpointError(f"{where}: {span} are {problem}; take another checkpoint")
        position = stop


@contextmanager
def verified_local_file(
    store: Store, path: str, record: FileRecord, mend: str = "take another checkpoint"
) -> Iterator[Path]:
    """The object as a local file: in place where the store is files, else a temporary copy. Size and digest checked.

    Raises DamagedFile.
    """
    uri = store.uri(path)
    if not store.exists(path):
        raise DamagedFile(f"{uri} is missing; {mend}")
    with tempfile.TemporaryDirectory() as scratch:
        local = store.local_path(path)
        if local is None:
            local = Path(scratch) / Path(path).name
            store.get_file(path, local)
        found = record_file(local)
        if found != record:
            detail = f"{found.bytes} bytes, not {record.bytes}" if found.bytes != record.bytes else "another SHA-256"
            raise DamagedFile(f"{uri} is damaged ({detail}); {mend}")
        yield local
