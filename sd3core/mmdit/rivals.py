"""The backbones that the paper compares MM-DiT with: DiT, CrossDiT, UViT.

Section 5.2.3, figure 4.

Same call, embedding, positions, modulation and start as MM-DiT; they differ in how text meets the image. The paper gives
none of their sizes. Here all have MM-DiT's depth and width; `sd3 plan` shows parameters and FLOPs of each side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sd3core.backbone_config import GROUP_CHANNELS, CrossDiTConfig, DiTConfig, UViTConfig
from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.layers import CrossBlock, SelfBlock


class DiT(Backbone):
    """Text and image tokens as one sequence through one set of weights (Peebles and Xie 2023): MM-DiT with its streams tied."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(
            SelfBlock(config.hidden_size, config.num_heads, config.qk_norm) for _ in range(config.depth)
        )
        self.init_weights()

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        x = self.embed_patches(latent)  # (B, Lx, H)
        c, y = self.embed_conditions(t, context, pooled)  # (B, Lc, H), (B, H)

        tokens = torch.cat([c, x], dim=1)  # (B, Lc + Lx, H), text first
        for block in self.blocks:
            tokens = block(tokens, y)

        x = tokens[:, c.shape[1] :]  # (B, Lx, H)
        return self.unpatchify(x, y, latent.shape[2]).to(latent.dtype)  # (B, C, h, w)


class CrossDiT(Backbone):
    """Image tokens that look at the text by cross-attention in every block, as in PixArt-alpha (Chen et al. 2023).

    The text tokens are embedded once and stay as they are. Modulation is the block's own, as in all backbones here;
    PixArt shares one between the blocks.
    """

    zero_layers: ClassVar[tuple[str, ...]] = (*Backbone.zero_layers, "cross.proj")

    def __init__(self, config: CrossDiTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(
            CrossBlock(config.hidden_size, config.num_heads, config.qk_norm) for _ in range(config.depth)
        )
        self.init_weights()

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        x = self.embed_patches(latent)  # (B, Lx, H)
        c, y = self.embed_conditions(t, context, pooled)  # (B, Lc, H), (B, H)

        for block in self.blocks:
            x = block(x, c, y)

        return self.unpatchify(x, y, latent.shape[2]).to(latent.dtype)  # (B, C, h, w)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP_CHANNELS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, modulated between them: the block of UViT's U-Net. (B, C, h, w), (B, H) -> (B, C', h, w)."""

    def __init__(self, channels: int, channels_out: int, hidden_size: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * channels_out))
        self.skip = nn.Identity() if channels == channels_out else nn.Conv2d(channels, channels_out, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = rearrange(self.adaLN_modulation(y), "b (two c) -> two b c 1 1", two=2)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class UViT(Backbone):
    """A convolutional U-Net whose lowest level is a transformer: simple diffusion (Hoogeboom et al. 2023).

    Our reading for latents: one convolutional level at the latent's resolution with H / 4 channels, then the patches'
    resolution, where MM-DiT works too, with `depth` transformer blocks of width H. Text comes in there by cross-attention.
    """

    zero_layers: ClassVar[tuple[str, ...]] = ("adaLN_modulation.1", "cross.proj", "conv2", "conv_out")

    def __init__(self, config: UViTConfig):
        channels, width = config.conv_channels, config.hidden_size
        super().__init__(config, channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(channels, channels, width) for _ in range(config.conv_blocks))
        self.blocks = nn.ModuleList(CrossBlock(width, config.num_heads, config.qk_norm) for _ in range(config.depth))
        self.up = nn.ModuleList(ResidualBlock(2 * channels, channels, width) for _ in range(config.conv_blocks))
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)
        self.init_weights()

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        c, y = self.embed_conditions(t, context, pooled)  # (B, Lc, H), (B, H)

        image = self.conv_in(latent.to(self.dtype))  # (B, H / 4, h, w)
        skips = []
        for block in self.down:
            image = block(image, y)
            skips.append(image)

        x = self.embed_patches(image)  # (B, Lx, H)
        for block in self.blocks:
            x = block(x, c, y)
        image = self.unpatchify(x, y, latent.shape[2])  # (B, H / 4, h, w)

        for block in self.up:
            image = block(torch.cat([image, skips.pop()], dim=1), y)
        return self.conv_out(F.silu(self.norm_out(image))).to(latent.dtype)  # (B, C, h, w)

    def recomputable(self) -> Iterator[nn.Module]:
        yield from (*self.down, *self.blocks, *self.up)
