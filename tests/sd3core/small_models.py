"""An MM-DiT small enough for a test, with weights that let every part speak."""

import torch

from sd3core.mmdit import MMDiT, MMDiTConfig


def small_config(depth: int = 3, **overrides) -> MMDiTConfig:
    sizes = {"hidden_size": 128, "num_heads": 2, "context_dim": 48, "pooled_dim": 40}
    positions = {"position_base": 4, "position_side": 8, "position_max": 16}
    return MMDiTConfig.from_depth(depth, **(sizes | positions | overrides))


def randomise(model: MMDiT, seed: int = 0) -> MMDiT:
    """Weights of one seed, none zero: a fresh model hides most of its parts behind zero gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
            p.copy_(1 + spread if "ln_" in name else spread)
    return model


def small_inputs(batch: int = 2, height: int = 8, width: int = 12, tokens: int = 7, config: MMDiTConfig | None = None):
    config = config or small_config()
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, config.latent_channels, height, width, generator=generator),
        torch.linspace(0.1, 0.9, batch),
        torch.randn(batch, tokens, config.context_dim, generator=generator),
        torch.randn(batch, config.pooled_dim, generator=generator),
    )
