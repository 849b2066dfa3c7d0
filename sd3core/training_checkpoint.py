"""Training checkpoints: how they lie in the store, and the ranks' tensors.

FOLDER/000000012800/ (samples seen)
    rank-000-of-002.safetensors    flat fp32 pieces "KIND/PARAMETER/START" of the tensors, each element once
    metrics.jsonl                  a row per logged step since the checkpoint before
    DONE.json                      `sd3core.checkpoint_record.CheckpointDone`, last: without it the checkpoint does not exist

The format knows neither world size nor ZeRO stage, so it loads under any other. safetensors and JSON only, no pickle.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sd3core.checkpoint_record import CheckpointDone, DamagedFile, path_in, read_checkpoint_done
from sd3core.data.records import FileRecord, record_file
from sd3core.data.store import Store
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import TensorFiles
from sd3core.specs import DONE_FILE

TENSOR_KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
TensorKind = Literal["weights", "exp_avg", "exp_avg_sq", "ema"]


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
    record = store.uri(path_in(folder, DONE_FILE))
    mend = (
        f"take another checkpoint, or delete {record} and run the training stage again: it goes on from an earlier one"
    )
    for name in done.rank_files if files is None else files:
        verified = verified_local_file(store, path_in(folder, name), done.files[name], mend)
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
