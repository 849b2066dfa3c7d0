"""Converts a model's weights from one format into another, tensor by tensor.

`sd3 import` and `sd3 export` call it; weights need not fit into memory.

Weights travel in spans of at most SPAN elements (a training checkpoint's: of at most one parameter), each read, cast
and written before the next. Sources: another system's weights (`ForeignWeights`), a plain model folder, a training
checkpoint. Targets: a plain model folder, a diffusers transformer folder, a single file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from sd3core.buckets import DOWNSAMPLING
from sd3core.checkpoint import MODEL_FILE, Checkpoint, Span, WeightSpans, model_shapes, open_checkpoint
from sd3core.checkpoint_facts import CheckpointFacts, Null
from sd3core.checkpoint_formats import BARE, DIFFUSERS, SINGLE_FILE, Format, check_released_form, diffusers_config
from sd3core.checkpoint_record import CHECKPOINT_FORMAT, CONFIG_FILE
from sd3core.data.records import record_file
from sd3core.data.store import canonical_json, open_store
from sd3core.errors import CheckpointError, UserError
from sd3core.exchange.foreign_weights import ForeignWeights
from sd3core.files.tensor_files import TensorFiles, TensorFileWriter, TensorInfo
from sd3core.files.whole_output import atomic_output
from sd3core.formulation_names import export_problem
from sd3core.mmdit import MMDiTConfig
from sd3core.recipe import Text
from sd3core.sample_settings import Weights

RELEASED_SIDE_PX, RELEASED_SHIFT = 1024, 3.0
EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]
TargetName = Literal["diffusers", "single-file"]
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
OnBytes = Callable[[int, int], None]  # written so far, and in all


@dataclass(frozen=True)
class Source:
    """A model whose weights can be had span by span."""

    config: MMDiTConfig
    weights: WeightSpans
    side_px: int | None = None  # of the square that it makes best; None: not known


def assumed_facts(
    foreign: ForeignWeights,
    *,
    null: Null | None = None,
    t5_tokens: int | None = None,
    shift: float | None = None,
    side_px: int | None = None,
) -> CheckpointFacts:
    """How foreign weights want to be sampled from: what is given, what lies beside them, else what SD3 was released with.

    Released: the encoded empty string as "no prompt", 77 CLIP tokens, shift 3, 1024 px. For T5 the paper and the
    reference code have 77 tokens, diffusers' pipeline 256: 77 is taken.
    """
    beside = foreign.beside()
    step = foreign.config.patch_size * DOWNSAMPLING
    largest = foreign.config.position_max * step
    if side_px is not None and (side_px % step or not step <= side_px <= largest):
        raise UserError(f"--side {side_px}: this model makes multiples of {step} px up to {largest}")
    text = Text(clip_tokens=beside.get("clip_tokens", 77), t5_tokens=t5_tokens or 77)
    return CheckpointFacts(
        null=null or "empty",
        text=text,
        side_px=side_px or _side_px(foreign),
        shift=shift or beside.get("shift", RELEASED_SHIFT),
        digest="",
    )


def _side_px(foreign: ForeignWeights) -> int:
    """px of the best square: by diffusers' config.json, else by a position table larger than that square, else 1024."""
    patch = foreign.config.patch_size * DOWNSAMPLING
    if foreign.stated.get("sample_size"):
        return foreign.stated["sample_size"] * DOWNSAMPLING
    if foreign.config.position_side < foreign.config.position_max:
        return foreign.config.position_side * patch
    return min(RELEASED_SIDE_PX, foreign.config.position_max * patch)


def import_model(
    foreign: ForeignWeights,
    out: str,
    extra: dict[str, Any],
    *,
    dtype: DtypeName | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> None:
    """Writes the plain model folder `out`, a new local path or a store's URL, in the stored dtype or in `dtype`.

    `extra` is kept in its config.json (see `CheckpointFacts.to_extra`). Raises UserError where `out` exists.
    """
    source = _foreign_source(foreign)
    with _new_folder(out) as folder:
        write_tensors(folder / MODEL_FILE, source, BARE, dtype, on_bytes)
        files = {MODEL_FILE: record_file(folder / MODEL_FILE).model_dump()}
        fields = {"format": CHECKPOINT_FORMAT, "model": source.config.to_dict(), "files": files, "extra": extra}
        (folder / CONFIG_FILE).write_bytes(canonical_json(fields))


def export_model(
    checkpoint: str,
    out: Path | str,
    target: TargetName,
    *,
    weights: Weights | None = None,
    dtype: DtypeName | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> None:
    """The transformer of a checkpoint as `out`, which must not exist: a diffusers folder, or a single .safetensors file.

    checkpoint: URL or path of a plain model folder or a training checkpoint; of that, `weights` are its EMA by default.
    """
    with open_source(open_checkpoint(checkpoint), weights) as source, atomic_output(out) as path:
        if target == "diffusers":
            path.mkdir()
            write_transformer(path, source, dtype, on_bytes)
        else:
            write_tensors(path, source, SINGLE_FILE, dtype, on_bytes)


def write_transformer(
    folder: Path, source: Source, dtype: DtypeName | None, on_bytes: OnBytes = lambda done, total: None
) -> None:
    """The files of a diffusers SD3Transformer2DModel, into a folder that is there."""
    write_tensors(folder / TRANSFORMER_FILE, source, DIFFUSERS, dtype, on_bytes)
    config = diffusers_config(source.config)
    if source.side_px is not None:
        config["sample_size"] = source.side_px // DOWNSAMPLING
    write_config(folder / "config.json", "SD3Transformer2DModel", config)


def write_config(path: Path, class_name: str, fields: dict[str, Any]) -> None:
    """A config.json as diffusers reads it."""
    named = {"_class_name": class_name, "_diffusers_version": version("diffusers")} | fields
    path.write_text(json.dumps(named, indent=2) + "\n")


def write_tensors(path: Path, source: Source, form: Format, dtype: DtypeName | None, on_bytes: OnBytes) -> None:
    """A safetensors file of the source's tensors as the format names and arranges them."""
    shapes, depth = model_shapes(source.config), source.config.depth
    rows = {name: form.rows(name, shape[0], depth) for name, shape in shapes.items()}
    kept = {r.tensor: source.weights.dtypes[name] for name in shapes for r in rows[name]}
    infos = {
        name: TensorInfo(EXPORT_DTYPES[dtype] if dtype else kept[name], shape)
        for name, shape in form.shapes(source.config).items()
    }
    total, done = sum(info.bytes for info in infos.values()), 0
    on_bytes(0, total)
    with TensorFileWriter(path, infos) as out:
        for name, start, values in source.weights.read():
            width, first = _row_elements(shapes[name]), 0  # `first`: of the model's tensor, where these rows begin
            for r in rows[name]:
                size = r.count * width
                low, high = max(start, first), min(start + len(values), first + size)
                if low < high:
                    out.write(r.tensor, r.start * width + low - first, values[low - start : high - start])
                    done += (high - low) * infos[r.tensor].dtype.itemsize
                first += size
            on_bytes(done, total)


@contextmanager
def open_source(checkpoint: Checkpoint, weights: Weights | None = None) -> Iterator[Source]:
    """A plain model folder or a training checkpoint of an MM-DiT that other systems know.

    Raises CheckpointError that names what is missing, damaged or unknown, or the architecture or formulation that they
    do not know.
    """
    check_released_form(checkpoint.config, checkpoint.url)
    # Other systems take a network's output for rectified flow's velocity, so weights that mean another would mislead.
    if problem := export_problem(checkpoint.formulation):
        raise CheckpointError(f"{checkpoint.url}: {problem}")
    with checkpoint.spans(weights) as spans:
        yield Source(checkpoint.config, spans, checkpoint.trained.get("side_px"))


def _foreign_source(foreign: ForeignWeights) -> Source:
    config, files = foreign.config, foreign.files
    dtypes = {}
    for name, shape in model_shapes(config).items():
        stored = {files.infos[r.tensor].dtype for r in foreign.form.rows(name, shape[0], config.depth)}
        dtypes[name] = stored.pop() if len(stored) == 1 else torch.float32
    return Source(config, WeightSpans(dtypes, lambda: _spans_of_files(files, foreign.form, config)))


def _spans_of_files(files: TensorFiles, form: Format, config: MMDiTConfig) -> Iterator[Span]:
    for name, shape in model_shapes(config).items():
        width, first = _row_elements(shape), 0
        for r in form.rows(name, shape[0], config.depth):
            size = r.count * width
            for start, values in files.spans(r.tensor, r.start * width, size):
                yield name, first + start, values
            first += size


def _row_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[1:]).numel()


@contextmanager
def _new_folder(out: str) -> Iterator[Path]:
    """A folder on this machine that becomes `out`, whole or not at all. In a store config.json is put last."""
    store = open_store(out)
    local = store.local_path(CONFIG_FILE)
    if local is not None:
        with atomic_output(local.parent) as folder:
            folder.mkdir()
            yield folder
        return
    if store.exists(CONFIG_FILE):
        raise UserError(f"{out} exists already; name another, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for name in (MODEL_FILE, CONFIG_FILE):
            store.put_file(name, Path(scratch) / name)
