"""MM-DiT, read from top to bottom: sizes, the forward pass, the initial weights. Paper section 4."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit.layers import (
    SINUSOID_CHANNELS,
    Attention,
    AttentionWeights,
    FinalLayer,
    JointBlock,
    PatchEmbed,
    VectorEmbed,
    timestep_sinusoid,
)
from sd3core.mmdit.positions import crop_positions, grid_coordinates, position_table

HEAD_WIDTH = 64
ADDED_LATER = {"dual_attention_blocks": 0}  # fields of MMDiTConfig -> default


@dataclass(frozen=True)
class MMDiTConfig:
    """Every size of an MM-DiT. `from_depth` is the paper's rule: width 64 * depth, as many heads as blocks.

    Positions are counted in patches: a square grid of `position_base` patches has coordinates 0, 1, 2, ...; the model
    works around squares of `position_side` patches; `position_max` is the longest side of any grid.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int = 2
    latent_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 2048
    qk_norm: str | None = None  # None or "rms"
    clip_tokens: int | None = None  # where the context splits into CLIP and T5 for three streams; None: two streams
    position_base: int = 16
    position_side: int = 64
    position_max: int = 192
    dual_attention_blocks: int = 0  # the first n blocks give the image a second attention; SD3.5-medium: 13 of 24

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms"):
            raise CheckpointError(f"model config: qk_norm is {self.qk_norm!r}; it is null or 'rms'")
        if self.clip_tokens is not None:
            raise CheckpointError("model config: clip_tokens asks for three streams; there are only two: leave it null")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise CheckpointError(f"model config: hidden_size {self.hidden_size} is no multiple of 4 and of num_heads")
        if min(self.depth, self.num_heads, self.position_base, self.position_side, self.position_max) < 1:
            raise CheckpointError("model config: depth, num_heads and the three position sizes must be at least 1")
        if not 0 <= self.dual_attention_blocks <= self.depth:
            raise CheckpointError(
                f"model config: dual_attention_blocks {self.dual_attention_blocks} is not between 0 and depth {self.depth}"
            )

    @classmethod
    def from_depth(cls, depth: int, **overrides: Any) -> MMDiTConfig:
        """hidden_size = 64 * depth, num_heads = depth."""
        return cls.from_dict({"depth": depth, "hidden_size": HEAD_WIDTH * depth, "num_heads": depth} | overrides)

    def to_dict(self) -> dict[str, Any]:
        """All fields; those that came after the first checkpoints only where they are not at their default, so that
        fingerprints of older recipes and checkpoints stay.
        """
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in ADDED_LATER or v != ADDED_LATER[k]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MMDiTConfig:
        """Strict inverse of `to_dict`. Raises CheckpointError that names an unknown or missing key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; valid here: {', '.join(known)}"
                raise CheckpointError(f"model config: unknown key {key!r}{hint}")
        for key in ("depth", "hidden_size", "num_heads"):
            if key not in fields:
                raise CheckpointError(f"model config: {key!r} is missing")
        return cls(**fields)


class MMDiT(nn.Module):
    """velocity = MMDiT(config)(latent, t, context, pooled). Architecture only: anything else comes from outside."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.latent_channels, width)
        self.t_embedder = VectorEmbed(SINUSOID_CHANNELS, width)
        self.y_embedder = VectorEmbed(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                width,
                config.num_heads,
                config.qk_norm,
                last=i == config.depth - 1,
                dual=i < config.dual_attention_blocks,
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.patch_size, config.latent_channels)
        self.register_buffer("pos_embed", torch.empty(1, config.position_max**2, width))
        self.init_weights()

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity noise - x0, of latent's shape and dtype.

        latent (B, C, h, w); t (B,) in [0, 1], 1 = noise; context (B, L, context_dim), CLIP tokens first; pooled
        (B, pooled_dim). Any float dtypes: the weights' one is computed in. h and w are multiples of patch_size that fit
        the position table, else DataError.
        """
        p, dtype = self.config.patch_size, self.context_embedder.weight.dtype
        height, width = latent.shape[2] // p, latent.shape[3] // p
        if (height * p, width * p) != tuple(latent.shape[2:]):
            raise DataError(f"a latent of {tuple(latent.shape[2:])} is not a multiple of the patch size {p}")

        x = self.x_embedder(latent.to(dtype))  # (B, Lx, H)
        x = x + crop_positions(self.pos_embed, height, width).to(dtype)
        c = self.context_embedder(context.to(dtype))  # (B, Lc, H)
        y = self.t_embedder(timestep_sinusoid(t).to(dtype)) + self.y_embedder(pooled.to(dtype))  # (B, H)

        for block in self.joint_blocks:
            x, c = block(x, c, y)

        x = self.final_layer(x, y)  # (B, Lx, p * q * C)
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)
        return x.to(latent.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The convention of DiT; the paper gives none. Drawn from torch's global generator.

        | weights                                         | start                                          |
        |-------------------------------------------------|------------------------------------------------|
        | every Linear not named below, patch projection  | Xavier uniform                                 |
        | t_embedder, y_embedder                          | N(0, 0.02)                                     |
        | adaLN_modulation of all blocks and final layer  | 0, so a fresh block is the identity            |
        | final_layer.linear                              | 0, so a fresh model gives 0                    |
        | every bias                                      | 0                                              |
        | ln_q, ln_k                                      | 1                                              |
        | pos_embed (not trained)                         | the codes of `sd3core.mmdit.positions`         |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith(("t_embedder.", "y_embedder.")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
        self.reset_positions()

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Fills pos_embed from the config."""
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(config_positions(self.config))


def config_positions(config: MMDiTConfig) -> Tensor:
    """The position table a config asks for: (1, position_max^2, hidden_size) float32."""
    coordinates = grid_coordinates(config.position_base, config.position_side, config.position_max)
    return position_table(coordinates, config.hidden_size)


def insert_qk_norm(model: MMDiT) -> MMDiT:
    """Gives every stream RMS norms of queries and keys with scale one, in place, and returns the model. Paper 5.3.2.

    Weights that were there stay as they are. A model that has QK-norm is returned unchanged.
    """
    if model.config.qk_norm is None:
        for module in model.modules():
            if isinstance(module, AttentionWeights):
                module.insert_qk_norm()
        model.config = dataclasses.replace(model.config, qk_norm="rms")
    return model


@torch.no_grad()
def max_attention_logit(model: MMDiT, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """max |q k^T| / sqrt(d) of every attention in one forward pass of these inputs (paper figure 5). float32.

    -> (attentions,), in the order of the forward pass: one a block, and one more where a block has a second attention.
    Looks in through hooks that are gone afterwards; costs one attention matrix of one sample at a time.
    """
    maxima: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        q, k, _ = inputs
        logits = (torch.einsum("l n d, m n d -> n l m", *pair) for pair in zip(q.float(), k.float(), strict=True))
        maxima.append(torch.stack([sample.abs().amax() for sample in logits]).amax() / q.shape[-1] ** 0.5)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, Attention)]
    try:
        model(latent, t, context, pooled)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maxima)
