"""Weights to and from diffusers' transformer and the released single files.

These are SD3, SD3.5-medium and SD3.5-large.

One table of names serves both directions. The model's own names are those of the single file without its prefix. Each of
the model's tensors is made of whole rows of a file's tensors (`Format.rows`), so weights are converted by moving spans
of bytes, and a conversion and its inverse give the same bits. Names and shapes are checked before any weight is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd3core.backbone_config import HEAD_WIDTH
from sd3core.checkpoint import check_shapes, model_from_state, model_shapes
from sd3core.errors import CheckpointError
from sd3core.files.tensor_files import Shape
from sd3core.mmdit import BackboneConfig, MMDiT, MMDiTConfig
from sd3core.mmdit.positions import coordinates_of_row, grid_coordinates, sine_cosine
from sd3core.words import counted, some

SINGLE_FILE_PREFIX = "model.diffusion_model."
PASSED_OVER = {
    "first_stage_model.": "the VAE",
    "vae.": "the VAE",
    "text_encoders.": "the text encoders",
    "cond_stage_model.": "the text encoders",
    "text_encoder.": "the text encoders",
    "text_encoder_2.": "the text encoders",
    "text_encoder_3.": "the text encoders",
}
BLOCK_KEY = re.compile(r"((?:[^.]+\.)*?)(joint_blocks\.|transformer_blocks\.)\d")

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
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
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


@dataclass(frozen=True)
class Rows:
    """`count` rows of a file's tensor, from row `start` on along its first dimension."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True)
class Format:
    """How a file names and arranges the tensors of an MM-DiT."""

    name: str
    blocks: str  # what the names of the joint blocks' tensors begin with, before the block's number
    file_names: Callable[[str], tuple[str, ...]]  # one of the model's names -> the tensors that it is stacked from
    scale_first: bool = False  # (scale, shift) where the original has (shift, scale): final layer, last text stream
    prefix: str = ""  # of all names

    def under(self, prefix: str) -> Format:
        """This format with a prefix before every name, as wrappers of a model write it."""
        return replace(
            self,
            name=f"{self.name} under {prefix!r}",
            blocks=prefix + self.blocks,
            file_names=lambda name: tuple(prefix + own for own in self.file_names(name)),
            prefix=prefix,
        )

    def rows(self, name: str, count: int, depth: int) -> list[Rows]:
        """The rows that the model's tensor `name` of `count` rows is made of, in its order."""
        names = self.file_names(name)
        if self.scale_first and _is_shift_and_scale(name, depth):
            half = count // 2
            return [Rows(names[0], half, half), Rows(names[0], 0, half)]
        return [Rows(tensor, 0, count // len(names)) for tensor in names]

    def shapes(self, config: MMDiTConfig) -> dict[str, Shape]:
        """Names and shapes of a file of such a model."""
        shapes: dict[str, Shape] = {}
        for name, shape in model_shapes(config).items():
            for rows in self.rows(name, shape[0], config.depth):
                before = shapes[rows.tensor][0] if rows.tensor in shapes else 0
                shapes[rows.tensor] = (before + rows.count, *shape[1:])
        return shapes


def _diffusers_names(name: str) -> tuple[str, ...]:
    if name == "pos_embed":
        return ("pos_embed.pos_embed",)
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if block is None:
        return (f"{TOP_NAMES[module]}.{kind}",)
    targets = BLOCK_NAMES[block.group(2)]
    targets = (targets,) if isinstance(targets, str) else targets
    return tuple(f"transformer_blocks.{block.group(1)}.{target}.{kind}" for target in targets)


def _is_shift_and_scale(name: str, depth: int) -> bool:
    return name.startswith(("final_layer.adaLN_modulation", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation"))


DIFFUSERS = Format("diffusers weights", "transformer_blocks.", _diffusers_names, scale_first=True)
BARE = Format("model weights", "joint_blocks.", lambda name: (name,))  # the single file's names without the prefix
SINGLE_FILE = replace(BARE.under(SINGLE_FILE_PREFIX), name="single file")
KEY_STYLES = (DIFFUSERS, BARE)


def recognise_all(names: Iterable[str]) -> list[Format]:
    """The formats of the MM-DiTs among the names, each with the prefix that it stands under.

    Blocks alone make one where there is no other: what is missing beside them can then be said.
    """
    names = set(names)
    found = {match.group(1, 2) for match in map(BLOCK_KEY.match, names) if match}
    forms = [_placed(form, prefix) for prefix, blocks in sorted(found) for form in KEY_STYLES if form.blocks == blocks]
    whole = [form for form in forms if form.file_names("x_embedder.proj.weight")[0] in names]
    return whole or forms[:1]


def _placed(form: Format, prefix: str) -> Format:
    if form is BARE and prefix == SINGLE_FILE_PREFIX:
        return SINGLE_FILE
    return form.under(prefix) if prefix else form


def check_released_form(config: BackboneConfig, where: str | None = None) -> None:
    """Raises CheckpointError for a model that diffusers and the released files have no form for."""
    if not config.released_form:
        what = "three-stream MM-DiT" if isinstance(config, MMDiTConfig) else config.architecture
        said = f"a {what} has no diffusers or single-file form, only a two-stream MM-DiT has"
        raise CheckpointError(f"{where}: {said}" if where else said)


def to_diffusers(model: MMDiT) -> dict[str, Tensor]:
    """State dict for SD3Transformer2DModel(**diffusers_config(model.config))."""
    check_released_form(model.config)
    return dict(to_diffusers_tensors(model.state_dict().items(), model.config.depth))


def to_diffusers_tensors(tensors: Iterable[tuple[str, Tensor]], depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of SD3Transformer2DModel, one at a time, from the model's own."""
    return _file_tensors(tensors, DIFFUSERS, depth)


def from_diffusers(state_dict: Mapping[str, Tensor]) -> MMDiT:
    """A model of the weights of a diffusers SD3 transformer: sizes from the shapes, positions from the stored table.

    Raises CheckpointError that names the tensors that are missing, unknown or of another shape.
    """
    return _model_of(state_dict, DIFFUSERS)


def from_diffusers_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors one at a time.

    `state_dict` may be a lazy mapping over files larger than memory, such as `TensorFiles`: with an attribute `shapes`,
    name -> shape, it is asked for each tensor once.
    """
    return _model_tensors(state_dict, DIFFUSERS)


def to_single_file(model: MMDiT) -> dict[str, Tensor]:
    """State dict under the released file's prefix; VAE and encoders are not in it."""
    check_released_form(model.config)
    return dict(to_single_file_tensors(model.state_dict().items()))


def to_single_file_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the released file, one at a time, from the model's own."""
    return _file_tensors(tensors, SINGLE_FILE, depth=0)


def from_single_file(state_dict: Mapping[str, Tensor]) -> MMDiT:
    """The transformer of a released single file, strict under its prefix.

    The keys of a VAE and of text encoders, and others outside the prefix, are passed over and named in a warning.

    Raises CheckpointError that names the tensors that are missing, unknown or of another shape.
    """
    passed_over = passed_over_in(state_dict, SINGLE_FILE)
    if passed_over:
        warnings.warn(f"single file: {passed_over} in it were passed over", stacklevel=2)
    return _model_of(state_dict, SINGLE_FILE)


def from_single_file_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors one at a time; `state_dict` as in `from_diffusers_tensors`."""
    return _model_tensors(state_dict, SINGLE_FILE)


def passed_over_in(names: Iterable[str], form: Format) -> str:
    """What else than the transformer a file holds: "the VAE and the text encoders", or "" for nothing."""
    outside = sorted(name for name in names if not _is_under(name, form))
    known = {prefix for name in outside for prefix in PASSED_OVER if name.startswith(prefix)}
    others = [name for name in outside if not name.startswith(tuple(PASSED_OVER))]
    said = sorted({PASSED_OVER[prefix] for prefix in known})
    said += (
        [f"{counted(len(others), 'tensor')} not under {form.prefix!r} ({some(others, len(others))})"] if others else []
    )
    return " and ".join(said)


def _is_under(name: str, form: Format) -> bool:
    return name.startswith(form.prefix) if form.prefix else not name.startswith(tuple(PASSED_OVER))


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
        "dual_attention_layers": list(range(config.dual_attention_blocks)),
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }


def config_of_shapes(
    shapes: Mapping[str, Shape], form: Format, where: str, head_width: int = HEAD_WIDTH
) -> MMDiTConfig:
    """The sizes that the names and shapes of a file's tensors imply, and the check that they are those of an MM-DiT.

    Heads have `head_width` channels unless QK-norm tells. Where positions lie the table's values tell: `with_positions`.
    Raises CheckpointError that names the tensors that are missing, unknown or of another shape.
    """
    shapes = {name: shape for name, shape in shapes.items() if _is_under(name, form)}

    def shape_of(name: str, dimensions: int) -> Shape:
        stored = form.file_names(name)[0]
        if stored not in shapes:
            raise CheckpointError(f"{where}: tensor {stored!r} missing: not an SD3 transformer, or not all of one")
        if len(shapes[stored]) != dimensions or 0 in shapes[stored]:
            raise CheckpointError(f"{where}: tensor {stored!r} has shape {shapes[stored]}: not an SD3 transformer")
        return shapes[stored]

    def blocks_with(name: str) -> list[int]:
        pattern = re.compile(re.escape(form.blocks) + r"(\d{1,6})\." + name)
        return [int(found.group(1)) for found in map(pattern.match, shapes) if found]

    depth = 1 + max(blocks_with(""), default=-1)
    if not 0 < depth <= len(shapes):
        raise CheckpointError(f"{where}: no tensor under {form.blocks!r}, or gaps: not an SD3 transformer")
    first_norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    normed = form.file_names(first_norm)[0] in shapes
    head_width = shape_of(first_norm, 1)[0] if normed else head_width
    hidden_size, latent_channels, patch_size, _ = shape_of("x_embedder.proj.weight", 4)
    if hidden_size % head_width:
        raise CheckpointError(f"{where}: hidden size {hidden_size} is no multiple of the heads' {head_width} channels")
    try:
        config = MMDiTConfig(
            depth=depth,
            hidden_size=hidden_size,
            num_heads=hidden_size // head_width,
            patch_size=patch_size,
            latent_channels=latent_channels,
            context_dim=shape_of("context_embedder.weight", 2)[1],
            pooled_dim=shape_of("y_embedder.mlp.0.weight", 2)[1],
            qk_norm="rms" if normed else None,
            position_max=round(shape_of("pos_embed", 3)[1] ** 0.5),
            dual_attention_blocks=1 + max(blocks_with(r"(x_block\.)?attn2\."), default=-1),
        )
    except CheckpointError as error:
        raise error if where in str(error) else CheckpointError(f"{where}: {error}") from None
    check_shapes(shapes, form.shapes(config), f"{where}: for an MM-DiT of depth {depth}")
    return config


def with_positions(config: MMDiTConfig, read_row: Callable[[int], Tensor]) -> tuple[MMDiTConfig, bool]:
    """position_base and position_side of a stored table, and whether it follows that grid in every row.

    read_row(i) -> (position_max, hidden_size): row i of the grid of patches. One row is held at a time.
    """
    side_of_codes, maximum = config.hidden_size // 2, config.position_max
    coordinates = coordinates_of_row(read_row(0)[:, :side_of_codes])
    if not np.isfinite(coordinates).all():
        return config, False
    spacing = (coordinates[-1] - coordinates[0]) / (maximum - 1) if maximum > 1 else 1.0
    side = max(1, round(maximum + 2 * coordinates[0] / spacing)) if spacing > 0 else maximum
    base = max(1, round(spacing * side))
    config = replace(config, position_base=base, position_side=side)
    codes = torch.from_numpy(sine_cosine(grid_coordinates(base, side, maximum), side_of_codes)).float()

    def follows(i: int) -> bool:
        implied = torch.cat([codes, codes[i].expand_as(codes)], dim=1)  # columns first, as in `position_table`
        return torch.allclose(read_row(i).float(), implied, atol=1e-2)

    return config, all(follows(i) for i in range(maximum))


def foreign_positions(where: str) -> str:
    return (
        f"{where}: the position table follows no grid of the paper's formula; it is kept as stored,"
        " but cannot be rebuilt for another resolution"
    )


def _file_tensors(tensors: Iterable[tuple[str, Tensor]], form: Format, depth: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        rows = form.rows(name, len(tensor), depth)
        parts = zip(rows, tensor.split([r.count for r in rows]), strict=True)
        if len({r.tensor for r in rows}) == len(rows):
            yield from ((r.tensor, part) for r, part in parts)
        else:
            yield rows[0].tensor, torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0].start)])


def _model_tensors(
    state_dict: Mapping[str, Tensor], form: Format, config: MMDiTConfig | None = None
) -> Iterator[tuple[str, Tensor]]:
    config = config or config_of_shapes(_shapes_of(state_dict), form, form.name)
    for name, shape in model_shapes(config).items():
        rows = form.rows(name, shape[0], config.depth)
        found = {tensor: state_dict[tensor] for tensor in dict.fromkeys(r.tensor for r in rows)}
        parts = [found[r.tensor][r.start : r.start + r.count] for r in rows]
        yield name, torch.cat(parts) if len(parts) > 1 else parts[0]


def _model_of(state_dict: Mapping[str, Tensor], form: Format) -> MMDiT:
    config = config_of_shapes(_shapes_of(state_dict), form, form.name)
    state = dict(_model_tensors(state_dict, form, config))
    table = state["pos_embed"].view(config.position_max, config.position_max, config.hidden_size)
    config, follows = with_positions(config, lambda i: table[i].cpu())
    if not follows:
        warnings.warn(foreign_positions(form.name), stacklevel=3)
    return model_from_state(config, state, form.name)


def _shapes_of(state_dict: Mapping[str, Tensor]) -> Mapping[str, Shape]:
    known = getattr(state_dict, "shapes", None)
    return known if known is not None else {name: tuple(state_dict[name].shape) for name in state_dict}
