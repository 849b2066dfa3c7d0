"""Weights to and from diffusers' SD3Transformer2DModel and the released single files, whole or tensor by tensor.

One table of names serves both directions. The model's own names are those of the single file without its prefix.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd3core.checkpoint import model_from_state
from sd3core.errors import CheckpointError
from sd3core.mmdit import BackboneConfig, MMDiT, MMDiTConfig
from sd3core.mmdit.config import HEAD_WIDTH
from sd3core.mmdit.positions import coordinates_of_table, grid_coordinates, position_table

SINGLE_FILE_PREFIX = "model.diffusion_model."
PASSED_OVER = {
    "first_stage_model.": "the VAE",
    "text_encoders.": "the text encoders",
    "cond_stage_model.": "the text encoders",
}

TOP_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BLOCK_NAMES = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}


def check_released_form(config: BackboneConfig) -> None:
    """Raises CheckpointError for a model that diffusers and the released files have no form for."""
    if not config.released_form:
        what = "three-stream MM-DiT" if isinstance(config, MMDiTConfig) else config.architecture
        raise CheckpointError(f"a {what} has no diffusers or single-file form, only a two-stream MM-DiT has; use save_model")


def to_diffusers(model: MMDiT) -> dict[str, Tensor]:
    """State dict for SD3Transformer2DModel(**diffusers_config(model.config))."""
    check_released_form(model.config)
    return dict(to_diffusers_tensors(model.state_dict().items(), model.config.depth))


def to_diffusers_tensors(tensors: Iterable[tuple[str, Tensor]], depth: int) -> Iterator[tuple[str, Tensor]]:
    """The same, a tensor at a time."""
    for name, tensor in tensors:
        targets = _diffusers_names(name)
        if _is_swapped(name, depth):
            tensor = _swap_halves(tensor)
        yield from zip(targets, tensor.chunk(len(targets)), strict=True)


def from_diffusers(state_dict: Mapping[str, Tensor]) -> MMDiT:
    """A model of the weights of a diffusers SD3 transformer: sizes from the shapes, positions from the stored table.

    Raises CheckpointError that names a missing or unknown tensor.
    """
    return _model_of(dict(from_diffusers_tensors(state_dict)), "diffusers weights")


def from_diffusers_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors one at a time; `state_dict` may be a lazy mapping over files larger than memory."""
    depth = _depth(state_dict, "transformer_blocks", "diffusers weights")
    left = set(state_dict)
    for name in _candidate_names(depth):
        sources = _diffusers_names(name)
        found = [source for source in sources if source in left]
        if not found:
            continue  # QK-norm or the last text stream, perhaps; `model_from_state` misses what must be there
        if len(found) < len(sources):
            raise CheckpointError(f"diffusers weights: tensor {(set(sources) - left).pop()!r} missing")
        tensor = torch.cat([state_dict[source] for source in sources]) if len(sources) > 1 else state_dict[sources[0]]
        left -= set(sources)
        yield name, _swap_halves(tensor) if _is_swapped(name, depth) else tensor
    if left:
        raise CheckpointError(f"diffusers weights: unknown tensor {min(left)!r}: not a two-stream SD3 transformer")


def diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """Arguments of SD3Transformer2DModel. All are given: its defaults are those of no released model."""
    return {
        "sample_size": config.position_side * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.position_max,
        "dual_attention_layers": [],
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }


def to_single_file(model: MMDiT) -> dict[str, Tensor]:
    """State dict under the released file's prefix; VAE and encoders are not in it."""
    check_released_form(model.config)
    return dict(to_single_file_tensors(model.state_dict().items()))


def to_single_file_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, a tensor at a time."""
    return ((SINGLE_FILE_PREFIX + name, tensor) for name, tensor in tensors)


def from_single_file(state_dict: Mapping[str, Tensor]) -> MMDiT:
    """The transformer of a released single file, strict under its prefix.

    The keys of a VAE and of text encoders are passed over and named in a warning.

    Raises CheckpointError that names a missing or unknown tensor.
    """
    found = {prefix for prefix in PASSED_OVER for name in state_dict if name.startswith(prefix)}
    passed_over = sorted({PASSED_OVER[prefix] for prefix in found})
    if passed_over:
        warnings.warn(f"single file: {' and '.join(passed_over)} in it were passed over", stacklevel=2)
    return _model_of(dict(from_single_file_tensors(state_dict)), "single file")


def from_single_file_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors one at a time; `state_dict` may be a lazy mapping."""
    _depth(state_dict, SINGLE_FILE_PREFIX + "joint_blocks", "single file")
    for name in state_dict:
        if name.startswith(SINGLE_FILE_PREFIX):
            yield name.removeprefix(SINGLE_FILE_PREFIX), state_dict[name]
        elif not name.startswith(tuple(PASSED_OVER)):
            raise CheckpointError(f"single file: unknown tensor {name!r}: not under {SINGLE_FILE_PREFIX!r}")


def config_of_state(state: Mapping[str, Tensor], where: str) -> MMDiTConfig:
    """The sizes that the shapes of a model's own tensors imply. Heads have 64 channels unless QK-norm tells."""
    for name in ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed"):
        if name not in state:
            raise CheckpointError(f"{where}: tensor {name!r} missing")
    hidden_size, latent_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    norm = state.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head_width = HEAD_WIDTH if norm is None else len(norm)
    base, side = _position_sizes(state["pos_embed"], where)
    return MMDiTConfig(
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("joint_blocks.")),
        hidden_size=hidden_size,
        num_heads=hidden_size // head_width,
        patch_size=patch_size,
        latent_channels=latent_channels,
        context_dim=state["context_embedder.weight"].shape[1],
        pooled_dim=state["y_embedder.mlp.0.weight"].shape[1],
        qk_norm=None if norm is None else "rms",
        position_base=base,
        position_side=side,
        position_max=round(state["pos_embed"].shape[1] ** 0.5),
    )


def _model_of(state: dict[str, Tensor], where: str) -> MMDiT:
    return model_from_state(config_of_state(state, where), state, where)


def _position_sizes(table: Tensor, where: str) -> tuple[int, int]:
    """position_base and position_side of a stored table: from its first coordinate and the spacing."""
    maximum = round(table.shape[1] ** 0.5)
    if maximum < 2:
        return 1, 1
    coordinates = coordinates_of_table(table.cpu())
    spacing = (coordinates[-1] - coordinates[0]) / (maximum - 1)
    side = max(1, round(maximum + 2 * coordinates[0] / spacing)) if spacing > 0 else maximum
    base = max(1, round(spacing * side))
    implied = position_table(grid_coordinates(base, side, maximum), table.shape[2])
    if not np.allclose(implied, table.cpu().float(), atol=1e-2):
        warnings.warn(
            f"{where}: the position table follows no grid of the paper's formula; it is kept as stored,"
            " but cannot be rebuilt for another resolution",
            stacklevel=4,
        )
    return base, side


def _diffusers_names(name: str) -> list[str]:
    """The diffusers tensors that one of the model's tensors is made of, in order along its first dimension."""
    if name == "pos_embed":
        return ["pos_embed.pos_embed"]
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if block is None:
        return [f"{TOP_NAMES[module]}.{kind}"]
    targets = BLOCK_NAMES[block.group(2)]
    targets = (targets,) if isinstance(targets, str) else targets
    return [f"transformer_blocks.{block.group(1)}.{target}.{kind}" for target in targets]


def _candidate_names(depth: int) -> Iterator[str]:
    """Every name a model of that depth can have, with QK-norm and without."""
    yield "pos_embed"
    modules = [*TOP_NAMES, *(f"joint_blocks.{i}.{module}" for i in range(depth) for module in BLOCK_NAMES)]
    for module in modules:
        yield f"{module}.weight"
        if not module.endswith(("ln_q", "ln_k")):
            yield f"{module}.bias"


def _is_swapped(name: str, depth: int) -> bool:
    """diffusers has (scale, shift) where the original has (shift, scale): final layer and last text stream."""
    return name.startswith(("final_layer.adaLN_modulation", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation"))


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _depth(names: Iterable[str], prefix: str, where: str) -> int:
    matches = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in names)
    blocks = [int(match.group(1)) for match in matches if match]
    if not blocks:
        raise CheckpointError(f"{where}: no tensor under {prefix!r}: not an SD3 transformer")
    return 1 + max(blocks)
