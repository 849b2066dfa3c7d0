"""What the towers cost, from their sizes alone: FLOPs of an image or caption.

A multiply-add counts as 2.

Counts linear maps, convolutions, q k^T and its product with v, as sd3core.mmdit.flops does; no norms, no activations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3core.recipe import Recipe, SmallClip

VAE_CHANNELS, IMAGE_CHANNELS, VAE_KERNEL = 16, 3, 3 * 3


@dataclass(frozen=True)
class Transformer:
    """Layers of self-attention and an MLP of `matrices` maps between `width` and `hidden`."""

    width: int
    layers: int
    hidden: int
    matrices: int = 2

    def flops(self, tokens: int) -> float:
        linear = 4 * self.width**2 + self.matrices * self.width * self.hidden
        return 2.0 * self.layers * (tokens * linear + 2 * tokens**2 * self.width)


@dataclass(frozen=True)
class Vae:
    """diffusers' AutoencoderKL: `channels` of the levels, each half the side of the one before."""

    channels: tuple[int, ...]
    layers: int  # resnets of a level of the encoder; the decoder has one more

    def encode_flops(self, height: int, width: int) -> float:
        pixels, before = height * width, self.channels[0]
        total = VAE_KERNEL * IMAGE_CHANNELS * before * pixels
        for level, channels in enumerate(self.channels):
            total += self._level(before, channels, self.layers, pixels)
            if level < len(self.channels) - 1:
                pixels //= 4
                total += VAE_KERNEL * channels**2 * pixels  # a convolution of stride 2
            before = channels
        return 2.0 * (total + self._middle(pixels) + VAE_KERNEL * before * 2 * VAE_CHANNELS * pixels)

    def decode_flops(self, height: int, width: int) -> float:
        pixels, before = height * width // 4 ** (len(self.channels) - 1), self.channels[-1]
        total = VAE_KERNEL * VAE_CHANNELS * before * pixels + self._middle(pixels)
        for level, channels in enumerate(reversed(self.channels)):
            total += self._level(before, channels, self.layers + 1, pixels)
            if level < len(self.channels) - 1:
                pixels *= 4
                total += VAE_KERNEL * channels**2 * pixels
            before = channels
        return 2.0 * (total + VAE_KERNEL * before * IMAGE_CHANNELS * pixels)

    def _level(self, before: int, channels: int, layers: int, pixels: int) -> int:
        """Resnets: two convolutions each, and a map of the first one's input where its channels are others."""
        convolutions = before * channels + (2 * layers - 1) * channels**2
        return pixels * (VAE_KERNEL * convolutions + (before * channels if before != channels else 0))

    def _middle(self, pixels: int) -> int:
        """Two resnets around one attention over all positions."""
        channels = self.channels[-1]
        return pixels * (4 * VAE_KERNEL + 4) * channels**2 + 2 * pixels**2 * channels


@dataclass(frozen=True)
class TowerSizes:
    vae: Vae
    clip_l: Transformer
    clip_g: Transformer
    t5: Transformer
    judge: Transformer  # the side that sees pictures
    judge_tokens: int

    def text_flops(self, clip_tokens: int, t5_tokens: int) -> float:
        """One caption through all three encoders, at full length as they are run."""
        return self.clip_l.flops(clip_tokens) + self.clip_g.flops(clip_tokens) + self.t5.flops(t5_tokens)


RELEASED = TowerSizes(  # SD3's, and CLIP ViT-L/14 as the judge
    vae=Vae((128, 256, 512, 512), 2),
    clip_l=Transformer(768, 12, 3072),
    clip_g=Transformer(1280, 32, 5120),
    t5=Transformer(4096, 24, 10240, 3),
    judge=Transformer(1024, 24, 4096),
    judge_tokens=257,
)


def tower_sizes(recipe: Recipe) -> TowerSizes:
    """The recipe's small towers; released ones by the configs of their folders, and as SD3 has them where those are not here."""
    small, released = recipe.towers.small, recipe.towers.released
    if small is not None:
        return TowerSizes(
            vae=Vae(small.vae.channels, small.vae.layers_per_block),
            clip_l=_small_clip(small.clip_l),
            clip_g=_small_clip(small.clip_g),
            t5=Transformer(small.t5.width, small.t5.layers, 5 * small.t5.width // 2, 3),
            judge=_small_clip(small.judge),
            judge_tokens=(small.judge.image_px // small.judge.patch_px) ** 2 + 1,
        )
    judge = _config(released.judge).get("vision_config") or {}
    patches = judge.get("image_size", 224) // judge.get("patch_size", 14)
    return TowerSizes(
        vae=_released_vae(_config(released.vae)),
        clip_l=_released(_config(released.clip_l), RELEASED.clip_l),
        clip_g=_released(_config(released.clip_g), RELEASED.clip_g),
        t5=_released(_config(released.t5), RELEASED.t5, ("d_model", "num_layers", "d_ff")),
        judge=_released(judge, RELEASED.judge),
        judge_tokens=patches**2 + 1,
    )


def _small_clip(clip: SmallClip) -> Transformer:
    return Transformer(clip.width, clip.layers, 4 * clip.width)


def _config(folder: str) -> dict[str, Any]:
    """{} where there is none, or none that can be read: the towers stage says so."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _released_vae(config: dict[str, Any]) -> Vae:
    channels = tuple(config.get("block_out_channels", RELEASED.vae.channels))
    return Vae(channels, config.get("layers_per_block", RELEASED.vae.layers))


def _released(
    config: dict[str, Any],
    assumed: Transformer,
    keys: Sequence[str] = ("hidden_size", "num_hidden_layers", "intermediate_size"),
) -> Transformer:
    sizes = zip(keys, (assumed.width, assumed.layers, assumed.hidden), strict=True)
    return Transformer(*(config.get(key, size) for key, size in sizes), assumed.matrices)
