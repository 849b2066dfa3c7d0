"""Opens training checkpoints and plain model folders alike; writes the folders.

Plain folder:         model.safetensors, then config.json (sizes, digest) last.
Training checkpoint:  see sd3core.training_checkpoint.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3core.checkpoint_facts import CheckpointFacts, checked_facts, trained_facts
from sd3core.checkpoint_record import CHECKPOINT_FORMAT, CONFIG_FILE, CheckpointDone, read_checkpoint_done
from sd3core.data.records import FileRecord, record_file
from sd3core.data.store import Store, open_store
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import Shape, TensorFiles
from sd3core.mmdit import Backbone, BackboneConfig, config_from_dict, make_model
from sd3core.mmdit.backbone import config_positions
from sd3core.sample_settings import Weights
from sd3core.specs import DONE_FILE
from sd3core.training_checkpoint import TensorKind, assemble_weights, read_kind, verified_local_file
from sd3core.words import counted

NAMED_TENSORS = 3  # of the tensors that an error is about
WEIGHTS_TO_KIND: dict[str, TensorKind] = {"ema": "ema", "live": "weights"}
MODEL_FILE = "model.safetensors"
FOREIGN_FILES = ("model_index.json", MODEL_FILE, f"{MODEL_FILE}.index.json")  # of diffusers, accelerate
Span = tuple[str, int, Tensor]  # one of the model's tensors, the first element, values (n,)


@dataclass(frozen=True)
class WeightSpans:
    """A model's weights to be read tensor by tensor, or by parts of one: they need not fit into memory."""

    dtypes: Mapping[str, torch.dtype]  # of the model's tensors, as they are stored
    read: Callable[[], Iterator[Span]]  # every element of every tensor once, in any order


class Checkpoint(ABC):
    """A model that is stored: what its record says, which is read already, and its weights, which are read when asked for.

    `weights` chooses those of a training checkpoint: the moving average (also the default) or the live ones.
    """

    url: str
    config: BackboneConfig
    digest: str  # names its content
    trained: Mapping[str, Any]  # what it says of its training: formulation, side_px, ...
    recipe: dict[str, Any] | None  # of the run that wrote it, empty where that kept none; None: no run wrote it

    @property
    def formulation(self) -> str:
        """What it was trained for; "rf" where it says none, as foreign weights are."""
        return self.trained.get("formulation", "rf")

    @property
    @abstractmethod
    def facts(self) -> CheckpointFacts:
        """How it wants to be sampled from. Raises CheckpointError that names what is missing."""

    @abstractmethod
    def weights_taken(self, weights: Weights | None = None) -> Weights | None:
        """Which are read where `weights` are asked for; None where there is one set, whose it does not say.

        Raises CheckpointError where there are none of that kind.
        """

    @abstractmethod
    def state(self, weights: Weights | None = None) -> dict[str, Tensor]:
        """Parameters and position table, whole, in the stored dtype. Raises CheckpointError that names what is damaged."""

    @abstractmethod
    def spans(self, weights: Weights | None = None) -> AbstractContextManager[WeightSpans]:
        """`state` by spans, while the block lasts. Raises CheckpointError where the tensors are not the model's."""

    def model(self, weights: Weights | None = None) -> Backbone:
        """On the CPU, in the stored dtype. Raises CheckpointError that names what is missing, damaged or unknown."""
        return model_from_state(self.config, self.state(weights), self.url)


@dataclass(frozen=True)
class ModelFolder(Checkpoint):
    """A model alone: its weights, and config.json, where `trained` is `extra`, which may be empty."""

    store: Store
    config: BackboneConfig
    record: FileRecord  # of the weights
    trained: Mapping[str, Any]
    recipe = None

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def digest(self) -> str:
        return self.record.sha256

    @cached_property
    def facts(self) -> CheckpointFacts:
        return checked_facts(self.trained, self.digest, getattr(self.config, "clip_tokens", None), self.url)

    def weights_taken(self, weights: Weights | None = None) -> None:
        _check_weights(weights)
        if weights is not None:
            raise CheckpointError(f"{self.url}: a model folder has one set of weights; leave out weights={weights!r}")

    def state(self, weights: Weights | None = None) -> dict[str, Tensor]:
        self.weights_taken(weights)
        with self._tensors() as tensors:
            return dict(tensors)

    @contextmanager
    def spans(self, weights: Weights | None = None) -> Iterator[WeightSpans]:
        self.weights_taken(weights)
        with self._tensors() as tensors:
            check_shapes(tensors.shapes, model_shapes(self.config), self.url)

            def read() -> Iterator[Span]:
                for name in tensors:
                    yield from ((name, start, values) for start, values in tensors.spans(name))

            yield WeightSpans({name: info.dtype for name, info in tensors.infos.items()}, read)

    @contextmanager
    def _tensors(self) -> Iterator[TensorFiles]:
        with verified_local_file(self.store, MODEL_FILE, self.record) as path, TensorFiles([path]) as tensors:
            yield tensors


@dataclass(frozen=True)
class TrainingCheckpoint(Checkpoint):
    """What the ranks of a training wrote: it goes on from here, at any world size, or a model is made of it."""

    store: Store
    folder: str  # "" where the store is the checkpoint
    done: CheckpointDone

    @property
    def url(self) -> str:
        return self.store.uri(self.folder) if self.folder else self.store.url

    @cached_property
    def config(self) -> BackboneConfig:
        return self.done.model_config_of()

    @cached_property
    def digest(self) -> str:
        return self.done.digest

    @property
    def trained(self) -> Mapping[str, Any]:
        return self.done.training

    @property
    def recipe(self) -> dict[str, Any]:
        return self.done.recipe or {}

    @cached_property
    def facts(self) -> CheckpointFacts:
        return trained_facts(self.done, self.url)

    def weights_taken(self, weights: Weights | None = None) -> Weights:
        _check_weights(weights)
        return weights or "ema"

    def state(self, weights: Weights | None = None) -> dict[str, Tensor]:
        kind = WEIGHTS_TO_KIND[self.weights_taken(weights)]
        parameters = assemble_weights(self.store, self.folder, kind, self.done)
        return parameters | {"pos_embed": config_positions(self.config)}

    @contextmanager
    def spans(self, weights: Weights | None = None) -> Iterator[WeightSpans]:
        kind, shapes = WEIGHTS_TO_KIND[self.weights_taken(weights)], model_shapes(self.config)
        trained = {name: tuple(shape) for name, shape in self.done.parameters.items()}
        check_shapes(trained | {"pos_embed": shapes["pos_embed"]}, shapes, self.url)

        def read() -> Iterator[Span]:
            for piece in read_kind(self.store, self.folder, self.done, kind):
                yield piece.parameter, piece.start, piece.values
            yield "pos_embed", 0, config_positions(self.config).flatten()

        yield WeightSpans(dict.fromkeys(shapes, torch.float32), read)


def open_checkpoint(url_or_path: str | Path) -> Checkpoint:
    """A training checkpoint (the folder of DONE.json) or a plain model folder, its record read and nothing else.

    Raises CheckpointError where it is neither, or where its record is damaged or another version's.
    """
    store = open_store(str(url_or_path))
    if store.exists(DONE_FILE):
        return read_training_checkpoint(store)
    if store.exists(CONFIG_FILE):
        return _read_model_folder(store)
    is_foreign = store.url.endswith(".safetensors") or any(store.exists(name) for name in FOREIGN_FILES)
    mend = "; `sd3 import` makes a model folder of another system's weights" if is_foreign else ""
    raise CheckpointError(f"{store.url}: no {CONFIG_FILE} (a model) and no {DONE_FILE} (a checkpoint) there{mend}")


def read_training_checkpoint(store: Store, folder: str = "") -> TrainingCheckpoint:
    """One in a store with others. Raises as `read_checkpoint_done`."""
    return TrainingCheckpoint(store, folder, read_checkpoint_done(store, folder))


def _read_model_folder(store: Store) -> ModelFolder:
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
        return ModelFolder(store, config_from_dict(fields["model"]), record, fields.get("extra", {}))
    except KeyError as error:
        raise CheckpointError(f"{where}: key {error} is missing; write the folder with save_model") from None
    except (ValueError, AttributeError, TypeError):
        raise CheckpointError(f"{where}: not a model's config; write the folder with save_model") from None
    except CheckpointError as error:
        raise error if where in str(error) else CheckpointError(f"{where}: {error}") from None


def _check_weights(weights: str | None) -> None:
    if weights not in (None, *WEIGHTS_TO_KIND):
        raise CheckpointError(f"weights={weights!r}: take 'ema' or 'live'")


def load_model(url_or_path: str | Path, weights: Weights | None = None) -> Backbone:
    """The model of a plain folder or of a training checkpoint (folder of DONE.json), on the CPU, in the stored dtype.

    `weights` chooses in a training checkpoint: the moving average (also the default) or the live weights.
    Raises CheckpointError that names what is missing, damaged or unknown.
    """
    return open_checkpoint(url_or_path).model(weights)


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
