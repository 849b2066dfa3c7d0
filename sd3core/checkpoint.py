"""Reads and writes checkpoints: a model folder, and the pieces of all ranks.

Plain folder:         model.safetensors, then config.json (sizes, digest) last.
Training checkpoint:  FOLDER/000000012800/ (samples seen)
    rank-000-of-002.safetensors    flat fp32 slices "KIND/PARAMETER/START" of the tensors, each element once
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from sd3core.data.records import FileRecord, own_digest, record_file, sealed
from sd3core.data.store import Store, StoreNotFound, open_store
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import Shape, TensorFiles
from sd3core.mmdit import Backbone, BackboneConfig, config_from_dict, make_model
from sd3core.mmdit.backbone import config_positions
from sd3core.sample_settings import Weights
from sd3core.words import counted

NAMED_TENSORS = 3  # of the tensors that an error is about
CHECKPOINT_FORMAT = 1  # raise it when a reader of today could not read what is written
TENSOR_KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
TensorKind = Literal["weights", "exp_avg", "exp_avg_sq", "ema"]
WEIGHTS_TO_KIND: dict[str, TensorKind] = {"ema": "ema", "live": "weights"}
DONE_FILE = "DONE.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FOREIGN_FILES = ("model_index.json", MODEL_FILE, f"{MODEL_FILE}.index.json")  # of diffusers, accelerate


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
    """Elements start .. start + len(values) of the flattened parameter."""

    kind: TensorKind
    parameter: str
    start: int
    values: Tensor  # (n,) float32


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
) -> Iterator[Piece]:
    """Every piece for which `wanted(kind, parameter, start, stop)`, file by file; each file's digest is checked first.

    Other pieces are not read from the file. Raises DamagedFile, or CheckpointError that names a tensor.
    """
    record = store.uri(_join(folder, DONE_FILE))
    mend = (
        f"take another checkpoint, or delete {record} and run the training stage again: it goes on from an earlier one"
    )
    for name in done.rank_files:
        verified = verified_local_file(store, _join(folder, name), done.files[name], mend)
        with verified as path, TensorFiles([path]) as tensors:
            for key, info in tensors.infos.items():
                kind, parameter, start = parse_piece_name(key)
                if wanted(kind, parameter, start, start + info.elements):
                    yield Piece(kind, parameter, start, tensors[key])


def read_kind(store: Store, folder: str, kind: TensorKind) -> Iterator[Piece]:
    """Every piece of one kind, as the ranks wrote them; holds one of them at a time.

    Raises CheckpointError, at the latest after the last piece, unless they cover every element of every parameter once.
    """
    done = read_checkpoint_done(store, folder)
    where = store.uri(folder) if folder else store.url
    sizes = {name: math.prod(shape) for name, shape in done.parameters.items()}
    covered: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for piece in read_pieces(store, folder, done, lambda k, *_: k == kind):
        stop = piece.start + len(piece.values)
        if piece.parameter not in sizes or stop > sizes[piece.parameter]:
            name = piece_name(piece.kind, piece.parameter, piece.start)
            raise CheckpointError(f"{where}: piece {name} lies outside the parameters of {DONE_FILE}")
        covered[piece.parameter].append((piece.start, stop))
        yield piece
    for name, spans in covered.items():
        _check_covered(where, kind, name, sorted(spans), sizes[name])


def assemble_weights(store: Store, folder: str, kind: TensorKind) -> dict[str, Tensor]:
    """One kind of tensor of every parameter, whole, float32.

    Raises CheckpointError unless the pieces cover every element of every parameter exactly once.
    """
    shapes = read_checkpoint_done(store, folder).parameters
    flat = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    for piece in read_kind(store, folder, kind):
        flat[piece.parameter][piece.start : piece.start + len(piece.values)] = piece.values
    return {name: flat[name].view(shape) for name, shape in shapes.items()}


def checkpoint_digest(url_or_path: str | Path) -> str:
    """What names the content of a training checkpoint (its digest) or of a model folder (SHA-256 of its weights)."""
    store = open_store(str(url_or_path))
    return (
        read_checkpoint_done(store, "").digest if is_training_checkpoint(store) else read_model_fields(store)[1].sha256
    )


def read_config(url_or_path: str | Path) -> BackboneConfig:
    """The sizes of a training checkpoint's or model folder's network, without its weights."""
    store = open_store(str(url_or_path))
    return (
        read_checkpoint_done(store, "").model_config_of()
        if is_training_checkpoint(store)
        else read_model_fields(store)[0]
    )


def save_model(url_or_path: str | Path, model: Backbone, extra: dict[str, Any] | None = None) -> None:
    """Writes a plain folder: model.safetensors in the model's dtype, then config.json. `extra` is kept there."""
    store = open_store(str(url_or_path))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / MODEL_FILE
        save_file(state, local, metadata={"format": "pt"})
        store.put_file(MODEL_FILE, local)
        files = {MODEL_FILE: record_file(local).model_dump()}
    fields = {"format": CHECKPOINT_FORMAT, "model": model.config.to_dict(), "files": files, "extra": extra or {}}
    store.put_json(CONFIG_FILE, fields)


def load_model(url_or_path: str | Path, weights: Weights | None = None) -> Backbone:
    """The model of a plain folder or of a training checkpoint (folder of DONE.json), on the CPU, in the stored dtype.

    `weights` chooses in a training checkpoint: the moving average (also the default) or the live weights.
    Raises CheckpointError that names what is missing, damaged or unknown.
    """
    store = open_store(str(url_or_path))
    if weights not in (None, *WEIGHTS_TO_KIND):
        raise CheckpointError(f"weights={weights!r}: take 'ema' or 'live'")
    if is_training_checkpoint(store):
        config = read_checkpoint_done(store, "").model_config_of()
        state = assemble_weights(store, "", WEIGHTS_TO_KIND[weights or "ema"])
        return model_from_state(config, state | {"pos_embed": config_positions(config)}, store.url)
    if weights is not None:
        raise CheckpointError(f"{store.url}: a model folder has one set of weights; leave out weights={weights!r}")
    config, record, _ = read_model_fields(store)
    with verified_local_file(store, MODEL_FILE, record) as path, TensorFiles([path]) as tensors:
        return model_from_state(config, dict(tensors), store.url)


def is_training_checkpoint(store: Store) -> bool:
    """True for a training checkpoint, False for a plain model folder; CheckpointError where the store is neither."""
    if store.exists(DONE_FILE):
        return True
    if not store.exists(CONFIG_FILE):
        is_foreign = store.url.endswith(".safetensors") or any(store.exists(name) for name in FOREIGN_FILES)
        mend = "; `sd3 import` makes a model folder of another system's weights" if is_foreign else ""
        raise CheckpointError(f"{store.url}: no {CONFIG_FILE} (a model) and no {DONE_FILE} (a checkpoint) there{mend}")
    return False


def model_from_state(config: BackboneConfig, state: dict[str, Tensor], where: str) -> Backbone:
    """A model whose parameters and position table are exactly those tensors (they are not copied).

    Raises CheckpointError that names a missing, unknown or wrongly shaped tensor.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model_shapes(config), where)
    with torch.device("meta"):
        model = make_model(config)
    model.load_state_dict(state, assign=True)
    return model


@cache
def model_shapes(config: BackboneConfig) -> Mapping[str, Shape]:
    """Name and shape of every tensor of such a model, its position table included. Takes no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make_model(config).state_dict().items()}


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError of one line unless both say the same: each kind of difference with its count and names."""
    other = [name for name in sorted(wanted.keys() & found.keys()) if found[name] != wanted[name]]
    differences = (
        ("missing", [repr(name) for name in sorted(wanted.keys() - found.keys())]),
        ("unknown", [repr(name) for name in sorted(found.keys() - wanted.keys())]),
        ("of another shape", [f"{name!r} {found[name]} instead of {wanted[name]}" for name in other]),
    )
    said = [
        f"{counted(len(names), 'tensor')} {problem}: {', '.join(names[:NAMED_TENSORS])}{', ...' if len(names) > NAMED_TENSORS else ''}"
        for problem, names in differences
        if names
    ]
    if said:
        raise CheckpointError(f"{where}: {'; '.join(said)}")


def read_model_fields(store: Store) -> tuple[BackboneConfig, FileRecord, dict[str, Any]]:
    """Sizes, file and extra facts of a plain model folder, from its config.json."""
    where = store.uri(CONFIG_FILE)
    try:
        fields = store.get_json(CONFIG_FILE)
        if "_class_name" in fields:
            raise CheckpointError(f"{where}: of a diffusers folder; `sd3 import FOLDER OUT` makes a model folder of it")
        unknown = sorted(fields.keys() - {"format", "model", "files", "extra"})
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r}")
        if fields["format"] != CHECKPOINT_FORMAT:
            raise CheckpointError(f"{where}: format {fields['format']}; this version reads {CHECKPOINT_FORMAT}")
        record = FileRecord.model_validate(fields["files"][MODEL_FILE])
        return config_from_dict(fields["model"]), record, fields.get("extra", {})
    except KeyError as error:
        raise CheckpointError(f"{where}: key {error} is missing; write the folder with save_model") from None
    except (ValueError, AttributeError, TypeError):
        raise CheckpointError(f"{where}: not a model's config; write the folder with save_model") from None
    except CheckpointError as error:
        raise error if where in str(error) else CheckpointError(f"{where}: {error}") from None


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
