"""What MM-DiT and its rivals share: embeddings, positions, output, start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from sd3core.backbone_config import BackboneConfig
from sd3core.errors import DataError
from sd3core.mmdit.layers import SINUSOID_CHANNELS, FinalLayer, PatchEmbed, VectorEmbed, timestep_sinusoid
from sd3core.mmdit.positions import crop_positions, grid_coordinates, position_table


class Backbone(nn.Module):
    """velocity = Backbone(config)(latent, t, context, pooled). Architecture only: anything else comes from outside.

    latent (B, C, h, w); t (B,) in [0, 1], 1 = noise; context (B, L, context_dim), CLIP tokens first; pooled
    (B, pooled_dim). Any float dtypes: the weights' one is computed in; the output has latent's shape and dtype. h and w
    are multiples of patch_size that fit the position table, else DataError.

    A subclass adds its blocks, then calls `init_weights`. Its transformer's blocks are `blocks` or `joint_blocks`.
    """

    config: BackboneConfig
    zero_layers: ClassVar[tuple[str, ...]] = ("adaLN_modulation.1", "final_layer.linear")  # endings of names

    def __init__(self, config: BackboneConfig, channels: int | None = None):
        """channels: of what is cut into patches and comes out of them; None: the latent's."""
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, channels or config.latent_channels
        self.x_embedder = PatchEmbed(config.patch_size, channels, width)
        self.t_embedder = VectorEmbed(SINUSOID_CHANNELS, width)
        self.y_embedder = VectorEmbed(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        self.final_layer = FinalLayer(width, config.patch_size, channels)
        self.register_buffer("pos_embed", torch.empty(1, config.position_max**2, width))

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.context_embedder.weight.dtype

    def embed_conditions(self, t: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """c (B, Lc, H), the text tokens, and y (B, H), from which every block is modulated."""
        c = self.context_embedder(context.to(self.dtype))
        y = self.t_embedder(timestep_sinusoid(t).to(self.dtype)) + self.y_embedder(pooled.to(self.dtype))
        return c, y

    def embed_patches(self, image: Tensor) -> Tensor:
        """Patches and their positions. (B, channels, h, w) -> (B, Lx, H)."""
        p = self.config.patch_size
        height, width = image.shape[2] // p, image.shape[3] // p
        if (height * p, width * p) != tuple(image.shape[2:]):
            raise DataError(f"a latent of {tuple(image.shape[2:])} is not a multiple of the patch size {p}")
        return self.x_embedder(image.to(self.dtype)) + crop_positions(self.pos_embed, height, width).to(self.dtype)

    def unpatchify(self, x: Tensor, y: Tensor, height: int) -> Tensor:
        """The final layer's patches put together. x (B, Lx, H), y (B, H) -> (B, channels, height, w)."""
        p = self.config.patch_size
        x = self.final_layer(x, y)  # (B, Lx, p * q * channels)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, p=p, q=p)

    def recomputable(self) -> Iterator[nn.Module]:
        """The blocks whose activations can be dropped and computed again in the backward pass."""
        yield from self.blocks

    @torch.no_grad()
    def init_weights(self) -> None:
        """The convention of DiT; the paper gives none. Drawn from torch's global generator.

        | weights                                         | start                                          |
        |-------------------------------------------------|------------------------------------------------|
        | every Linear and convolution not named below    | Xavier uniform                                 |
        | t_embedder, y_embedder                          | N(0, 0.02)                                     |
        | `zero_layers`: modulation, what a block adds    | 0, so a fresh block is the identity            |
        | `zero_layers`: the layer that gives the output  | 0, so a fresh model gives 0                    |
        | every bias                                      | 0                                              |
        | ln_q, ln_k and other norms                      | 1                                              |
        | pos_embed (not trained)                         | the codes of `sd3core.mmdit.positions`         |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
                if name.endswith(self.zero_layers):
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


def config_positions(config: BackboneConfig) -> Tensor:
    """The position table a config asks for: (1, position_max^2, hidden_size) float32."""
    coordinates = grid_coordinates(config.position_base, config.position_side, config.position_max)
    return position_table(coordinates, config.hidden_size)
