"""Another system's SD3 weights on this machine: recognised by content, opened, and checked before a weight is read.

A single .safetensors file (the released ones, or a diffusers transformer's), a diffusers transformer folder, sharded or
not, or a diffusers pipeline folder, whose transformer/ is taken. Nothing is unpickled, and no file is opened that lies
outside the folder (its files may be links into the blobs/ of a Hugging Face cache, which are part of it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3core.checkpoint import DONE_FILE, MODEL_FILE
from sd3core.checkpoint_formats import (
    Format,
    config_of_shapes,
    diffusers_config,
    foreign_positions,
    passed_over_in,
    recognise,
    with_positions,
)
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiTConfig
from sd3core.mmdit.config import HEAD_WIDTH
from sd3core.tensor_files import TensorFiles

WEIGHTS = "diffusion_pytorch_model"
LARGEST_JSON = 10_000_000  # bytes
FLOATS = ("float32", "float16", "bfloat16")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MEND = "get the .safetensors of these weights"
ABSENT = {"dual_attention_layers": [], "qk_norm": None}  # what older configs mean by not having them


@dataclass(frozen=True)
class ForeignWeights:
    path: Path
    form: Format
    config: MMDiTConfig
    files: TensorFiles
    notes: tuple[str, ...]  # what a user should know
    stated: dict[str, Any] = field(default_factory=dict)  # the diffusers config.json beside the weights
    pipeline: Path | None = None  # the diffusers pipeline folder they lie in

    def beside(self) -> dict[str, Any]:
        """`shift` and `clip_tokens` as the pipeline folder states them, where it does."""
        found = {}
        for key, name, stated, allowed in (
            ("shift", "scheduler/scheduler_config.json", "shift", lambda value: 0 < value < 100),
            ("clip_tokens", "tokenizer/tokenizer_config.json", "model_max_length", lambda value: 4 <= value <= 77),
        ):
            path = self.pipeline / name if self.pipeline else None
            value = _read_json(_inside(self.pipeline, path)).get(stated) if path and path.exists() else None
            if type(value) in (int, float) and allowed(value):
                found[key] = value
        return found


@contextmanager
def open_foreign_weights(path: Path | str, any_dtype: bool = False) -> Iterator[ForeignWeights]:
    """Checked weights, whose files are open inside the block. `any_dtype`: they will be cast, so they may be in fp8 too.

    Raises CheckpointError of one line: the file, the tensors or fields that are wrong, and the mend.
    """
    path = Path(path)
    folder, pipeline, paths = _find(path)
    root = path if path.is_dir() else path.parent
    stated = _read_stated_config(root, folder) if folder else {}
    with TensorFiles(paths) as files:
        if folder and len(paths) > 1:
            _check_index(root, folder, files)
        form = recognise(files)
        if form is None:
            raise CheckpointError(f"{path}: no joint blocks or transformer blocks in it: not an SD3 transformer")
        where = str(paths[0] if len(paths) == 1 else folder)
        head_width = stated.get("attention_head_dim", HEAD_WIDTH)
        config = config_of_shapes(files.shapes, form, where, head_width)
        _check_stated(config, stated, folder)
        for name in form.shapes(config) if not any_dtype else ():
            dtype = str(files.infos[name].dtype).removeprefix("torch.")
            if dtype not in FLOATS:
                raise CheckpointError(f"{files.path_of(name)}: tensor {name!r} is {dtype}; add --dtype to cast it")
        side, table = config.position_max, form.file_names("pos_embed")[0]
        count = side * config.hidden_size
        config, follows = with_positions(
            config, lambda i: files.read(table, i * count, count).view(side, config.hidden_size)
        )
        passed_over = passed_over_in(files)
        notes = [f"{where}: left aside: {passed_over}"] if passed_over else []
        notes += [] if follows else [foreign_positions(where)]
        yield ForeignWeights(path, form, config, files, tuple(notes), stated, pipeline)


def _find(path: Path) -> tuple[Path | None, Path | None, list[Path]]:
    """-> the diffusers transformer folder, the pipeline folder (None where it is not one), the safetensors files."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path}: pickles are not read, loading one can run any program: {MEND}")
        if path.suffix == ".json":
            raise CheckpointError(f"{path}: name the folder that it is in, or a .safetensors file")
        beside = path.name.startswith(WEIGHTS) and (path.parent / "config.json").is_file()
        return path.parent if beside else None, None, [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    pipeline = path if (path / "model_index.json").is_file() else None
    folder = path / "transformer" if pipeline else path
    if (folder / DONE_FILE).is_file():
        raise CheckpointError(f"{path}: a training checkpoint of this system; `sd3 export` takes it")
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if (folder / f"{WEIGHTS}.safetensors").exists():
        names = [f"{WEIGHTS}.safetensors"]
    elif index.exists():
        names = sorted(set(_read_index(path, index).values()))
    else:
        names = sorted(found.name for found in folder.glob(f"{WEIGHTS}.*.safetensors"))  # a variant, as .fp16
        if len(names) != 1:
            raise CheckpointError(_nothing_to_take(folder, names))
    return folder, pipeline, [_inside(path, folder / name) for name in names]


def _nothing_to_take(folder: Path, variants: list[str]) -> str:
    others = variants or sorted(found.name for found in folder.glob("*.safetensors"))
    if MODEL_FILE in others:
        return f"{folder}: a model folder already; it is taken as it stands, `sd3 export` makes other formats of it"
    if others:
        return f"{folder}: name one of its files: {', '.join(others[:8])}"
    if any(found.suffix in PICKLES for found in folder.glob("*")) and folder.is_dir():
        return f"{folder}: only pickles there; they are not read, loading one can run any program: {MEND}"
    return f"{folder}: no {WEIGHTS}.safetensors there; name a .safetensors file, or a diffusers folder"


def _inside(root: Path, path: Path) -> Path:
    """The path, which must be a file of the folder `root`, or lie in the cache of the Hugging Face hub that holds it."""
    roots = [root.resolve()]
    roots += [parent.parent / "blobs" for parent in roots[0].parents if parent.name == "snapshots"]
    real = path.resolve()
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{path}: leads out of the folder, to {real}; copy the file there, or name it itself")
    if not real.is_file():
        raise CheckpointError(f"{path}: missing; get the folder again, whole")
    return path


def _read_index(root: Path, path: Path) -> dict[str, str]:
    """Tensor -> name of its file, a plain name."""
    weight_map = _read_json(_inside(root, path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map in it: not the index of a sharded model")
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(f"{path}: names the file {name!r}; it must be a .safetensors file beside it")
    return {tensor: str(name) for tensor, name in weight_map.items()}


def _check_index(root: Path, folder: Path, files: TensorFiles) -> None:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    stated = _read_index(root, index)
    wrong = sorted(
        name
        for name in stated.keys() | files.keys()
        if name not in files or files.path_of(name).name != stated.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{index}: {len(wrong)} tensors are not in the files that it says, {wrong[0]!r} the first"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path}: larger than {LARGEST_JSON} bytes: not what its name says")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object; get the file again")
    return fields


def _read_stated_config(root: Path, folder: Path) -> dict[str, Any]:
    """The config.json of a diffusers transformer folder."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    fields = _read_json(_inside(root, path))
    name = fields.get("_class_name", "SD3Transformer2DModel")
    if name != "SD3Transformer2DModel":
        raise CheckpointError(f"{path}: a {name}, not an SD3Transformer2DModel")
    for key in ("attention_head_dim", "sample_size"):
        if key in fields and (type(fields[key]) is not int or fields[key] < 1):
            raise CheckpointError(f"{path}: {key} is {fields[key]!r}")
    return ABSENT | fields


def _check_stated(config: MMDiTConfig, stated: dict[str, Any], folder: Path | None) -> None:
    """What config.json says must be what the shapes say. (sample_size is about the table, whose values tell.)"""
    of_shapes = diffusers_config(config)
    wrong = [
        f"{key} is {stated[key]!r}, the weights say {value!r}"
        for key, value in of_shapes.items()
        if key in stated
        and key != "sample_size"
        and stated[key] not in (value, None if key == "out_channels" else value)
    ]
    if wrong:
        raise CheckpointError(f"{folder}/config.json: {'; '.join(wrong)}")
