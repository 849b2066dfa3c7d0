"""Backbones small enough for a test, with weights that let every part speak."""

from functools import partial

import torch

from sd3core.mmdit import Backbone, BackboneConfig, CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig


def small_config(depth: int = 3, kind: type[BackboneConfig] = MMDiTConfig, **overrides) -> BackboneConfig:
    sizes = {"hidden_size": 128, "num_heads": 2, "context_dim": 48, "pooled_dim": 40}
    positions = {"position_base": 4, "position_side": 8, "position_max": 16}
    return kind.from_depth(depth, **(sizes | positions | overrides))


CLIP_TOKENS = 3  # of the 7 that `small_inputs` has
SMALL_BACKBONES = {  # name -> config, of every kind of block there is
    "mmdit": small_config,
    "mmdit-3-streams": partial(small_config, clip_tokens=CLIP_TOKENS),
    "mmdit-dual": partial(small_config, dual_attention_blocks=1),
    "dit": partial(small_config, kind=DiTConfig),
    "cross_dit": partial(small_config, kind=CrossDiTConfig),
    "uvit": partial(small_config, kind=UViTConfig),
}


def randomise(model: Backbone, seed: int = 0) -> Backbone:
    """Weights of one seed, none zero: a fresh model hides most of its parts behind zero gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
            p.copy_(1 + spread if "ln_" in name else spread)
    return model


def small_inputs(
    batch: int = 2, height: int = 8, width: int = 12, tokens: int = 7, config: BackboneConfig | None = None
):
    config = config or small_config()
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, config.latent_channels, height, width, generator=generator),
        torch.linspace(0.1, 0.9, batch),
        torch.randn(batch, tokens, config.context_dim, generator=generator),
        torch.randn(batch, config.pooled_dim, generator=generator),
    )
