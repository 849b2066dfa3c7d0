"""Recognises, opens and checks another system's SD3 weights.

They are known by their content, before a weight is read.

A single .safetensors file (the released ones, or a diffusers transformer's), the index of a sharded one, a folder of such (a
diffusers transformer's, or as accelerate saves a model), or a diffusers pipeline folder, whose transformer/ is taken. Nothing is unpickled, and no file is opened that lies
outside the folder (its files may be links into the blobs/ of a Hugging Face cache, which are part of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3core.backbone_config import HEAD_WIDTH
from sd3core.checkpoint import MODEL_FILE
from sd3core.checkpoint_formats import (
    Format,
    config_of_shapes,
    diffusers_config,
    foreign_positions,
    passed_over_in,
    recognise_all,
    with_positions,
)
from sd3core.checkpoint_record import CONFIG_FILE
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import TensorFiles
from sd3core.files.weight_files import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    WeightSet,
    find_weights,
    is_index,
    is_shard,
    read_json,
    read_weight_index,
    weights_of_index,
)
from sd3core.mmdit import MMDiTConfig
from sd3core.recipe import TOKENS_AT_MOST
from sd3core.specs import DONE_FILE

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
        found, most = {}, TOKENS_AT_MOST["clip_tokens"]
        for key, name, stated, allowed in (
            ("shift", "scheduler/scheduler_config.json", "shift", lambda value: 0 < value < 100),
            ("clip_tokens", "tokenizer/tokenizer_config.json", "model_max_length", lambda value: 4 <= value <= most),
        ):
            path = self.pipeline / name if self.pipeline else None
            value = read_json(_inside(self.pipeline, path)).get(stated) if path and path.exists() else None
            if type(value) in (int, float) and allowed(value):
                found[key] = value
        return found


@contextmanager
def open_foreign_weights(
    path: Path | str, any_dtype: bool = False, prefix: str | None = None
) -> Iterator[ForeignWeights]:
    """Checked weights, whose files are open inside the block. `any_dtype`: they will be cast, so they may be in fp8 too.

    `prefix` chooses among several sets of weights in one file, as live and averaged ones.

    Raises CheckpointError of one line: the file, the tensors or fields that are wrong, and the mend.
    """
    path = Path(path)
    found = _find(path)
    folder, paths = found.folder, found.paths
    stated = _read_stated_config(found.root, folder) if folder else {}
    with TensorFiles(paths) as files:
        if found.weights.index:
            _check_index(folder / found.weights.index, files)
        form = _recognised(files, path, prefix)
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
        passed_over = passed_over_in(files, form)
        notes = [f"{where}: left aside: {passed_over}"] if passed_over else []
        notes += [] if follows else [foreign_positions(where)]
        yield ForeignWeights(path, form, config, files, tuple(notes), stated, found.pipeline)


def _recognised(files: TensorFiles, path: Path, prefix: str | None) -> Format | None:
    """The format of the weights under the prefix, which must be given where several prefixes have any."""
    forms = {form.prefix: form for form in recognise_all(files)}
    under = ", ".join(map(repr, sorted(forms)))
    if prefix is not None:
        if prefix not in forms:
            raise CheckpointError(f"{path}: no SD3 transformer under --prefix {prefix!r}, only under {under or 'none'}")
        return forms[prefix]
    if len(forms) > 1:
        raise CheckpointError(f"{path}: several sets of weights, under {under}; name one with --prefix")
    return next(iter(forms.values()), None)


@dataclass(frozen=True)
class _Found:
    """Where the weights are, before one is read."""

    root: Path  # what a person named, or the folder of it: nothing outside it is opened
    folder: Path | None  # the diffusers transformer folder that they are in
    pipeline: Path | None  # the diffusers pipeline folder
    weights: WeightSet

    @property
    def paths(self) -> list[Path]:
        return [_inside(self.root, (self.folder or self.root) / name) for name in self.weights.files]


def _find(path: Path) -> _Found:
    if path.is_file():
        return _find_by_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    pipeline = path if (path / "model_index.json").is_file() else None
    folder = path / "transformer" if pipeline else path
    if (folder / DONE_FILE).is_file():
        raise CheckpointError(f"{path}: a training checkpoint of this system; `sd3 export` takes it")
    if _is_model_folder(path, folder):
        raise CheckpointError(
            f"{folder}: a model folder already; it is taken as it stands, `sd3 export` makes other formats of it"
        )
    for index in filter(lambda found: is_index(found.name), folder.glob("*.json")):
        _inside(path, index)
    weights = find_weights(folder, (DIFFUSERS_STEM, TRANSFORMERS_STEM))
    if weights is None:
        raise CheckpointError(_nothing_to_take(folder))
    return _Found(path, folder, pipeline, weights)


def _find_by_file(path: Path) -> _Found:
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: pickles are not read, loading one can run any program: {MEND}")
    if is_index(path.name):
        return _Found(path.parent, path.parent, None, weights_of_index(path.parent, path.name))
    if path.suffix == ".json":
        raise CheckpointError(f"{path}: name the folder that it is in, or a .safetensors file")
    if is_shard(path.name):
        raise CheckpointError(
            f"{path}: one of several files of a model; name the folder that they are in, {path.parent}"
        )
    beside = path.name.startswith(DIFFUSERS_STEM) and (path.parent / "config.json").is_file()
    return _Found(path.parent, path.parent if beside else None, None, WeightSet((path.name,)))


def _is_model_folder(root: Path, folder: Path) -> bool:
    """Whether `sd3 export` takes it as it stands. (Other systems call their weights model.safetensors as well.)"""
    config = folder / CONFIG_FILE
    if not (config.is_file() and (folder / MODEL_FILE).is_file()):
        return False
    return {"format", "files"} <= read_json(_inside(root, config)).keys()


def _nothing_to_take(folder: Path) -> str:
    others = sorted(found.name for found in folder.glob("*.safetensors"))
    whole = [name for name in others if not is_shard(name)]
    if whole:
        return f"{folder}: name one of its files: {', '.join(whole[:8])}"
    if others:
        return f"{folder}: shards are missing beside {others[0]}; get the folder again, whole"
    if any(found.suffix in PICKLES for found in folder.glob("*")) and folder.is_dir():
        return f"{folder}: only pickles there; they are not read, loading one can run any program: {MEND}"
    return f"{folder}: no {DIFFUSERS_STEM}.safetensors there; name a .safetensors file, or a diffusers folder"


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


def _check_index(index: Path, files: TensorFiles) -> None:
    stated = read_weight_index(index)
    wrong = sorted(
        name
        for name in stated.keys() | files.keys()
        if name not in files or files.path_of(name).name != stated.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{index}: {len(wrong)} tensors are not in the files that it says, {wrong[0]!r} the first"
        )


def _read_stated_config(root: Path, folder: Path) -> dict[str, Any]:
    """The config.json of a diffusers transformer folder."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    fields = read_json(_inside(root, path))
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
