"""Finds the weights in a library's folder, and refuses to choose between two.

They may be whole or in shards, in one precision or another.

Where a whole file and an index with shards both stand, diffusers opens the shards and transformers the whole file. One of them
may be left from before, so a person has to say which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sd3core.errors import CheckpointError

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
SUFFIX = ".safetensors"
INDEX_MARK = ".safetensors.index"  # of an index's name, before its variant and .json
LARGEST_JSON = 10_000_000  # bytes
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class WeightSet:
    """One whole set of weights. `files` are names in the folder; several are shards, by an index or by their numbers."""

    files: tuple[str, ...]
    index: str | None = None
    variant: str = ""  # as "fp16"; "" is the plain one

    @property
    def name(self) -> str:
        """The file that stands for all of it."""
        return self.index or self.files[0]


def find_weights(folder: Path, stems: Iterable[str]) -> WeightSet | None:
    """The folder's only set of weights under these names, or the only plain one beside other variants. None for none.

    Raises CheckpointError naming the sets where there are several, or an index that cannot be one.
    """
    sets = [weights for stem in stems for weights in _sets_of(folder, stem)]
    chosen = [weights for weights in sets if not weights.variant] or sets
    if len(chosen) > 1:
        names = " and ".join(weights.name for weights in chosen)
        raise CheckpointError(
            f"{folder}: {names} are both there and may differ; take one away, or name the one you mean"
        )
    return chosen[0] if chosen else None


def is_shard(name: str) -> bool:
    return name.endswith(SUFFIX) and SHARD.search(name) is not None


def is_index(name: str) -> bool:
    return INDEX_MARK in name and name.endswith(".json")


def weights_of_index(folder: Path, index: str) -> WeightSet:
    variant = index.partition(INDEX_MARK)[2].removesuffix(".json").strip(".")
    return WeightSet(tuple(sorted(set(read_weight_index(folder / index).values()))), index, variant)


def read_weight_index(path: Path) -> dict[str, str]:
    """Tensor -> name of its file, a plain name beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map in it: not the index of a sharded model")
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or not name.endswith(SUFFIX) or not name.isprintable():
            raise CheckpointError(f"{path}: names the file {name!r}; it must be a .safetensors file beside it")
    return {tensor: str(name) for tensor, name in weight_map.items()}


def read_json(path: Path) -> dict:
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path}: larger than {LARGEST_JSON} bytes: not what its name says")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object; get the file again")
    return fields


def _sets_of(folder: Path, stem: str) -> list[WeightSet]:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    indexes = [name for name in names if name.startswith(stem + INDEX_MARK) and is_index(name)]
    sets = [weights_of_index(folder, index) for index in indexes]
    indexed = {file for weights in sets for file in weights.files}
    pattern = re.compile(
        re.escape(stem) + r"(?:\.([A-Za-z0-9_]+))?(-\d{5}-of-\d{5})?(?:\.([A-Za-z0-9_]+))?\.safetensors"
    )
    shards: dict[tuple[str, str], list[str]] = {}
    for name, found in ((name, pattern.fullmatch(name)) for name in names):
        if found is None or name in indexed:
            continue
        variant = found.group(1) or found.group(3) or ""
        if found.group(2) is None:
            sets.append(WeightSet((name,), None, variant))
        else:
            shards.setdefault((variant, found.group(2)[-5:]), []).append(name)
    sets += [
        WeightSet(tuple(files), None, variant)
        for (variant, count), files in shards.items()
        if [int(SHARD.search(file).group(1)) for file in files] == list(range(1, int(count) + 1))
    ]
    return sets
