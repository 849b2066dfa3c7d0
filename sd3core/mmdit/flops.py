"""What a forward pass of the MM-DiT costs, from its sizes alone."""

from __future__ import annotations

from sd3core.mmdit.layers import MLP_RATIO, SINUSOID_CHANNELS
from sd3core.mmdit.model import MMDiTConfig


def forward_flops(config: MMDiTConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of one sample, 2 per multiply-add; a training step costs three times as many (backward: twice the forward).

    Counts the linear maps of both streams, the modulations, q k^T and its product with v; no norms, no activations.
    """
    width = config.hidden_size
    patch = config.patch_size**2 * config.latent_channels
    stream = (3 + 1 + 2 * MLP_RATIO) * width**2  # qkv, proj, MLP: multiply-adds a token
    tokens = image_tokens + text_tokens
    block = stream * tokens + 2 * tokens**2 * width + 2 * 6 * width**2
    dual = 4 * width**2 * image_tokens + 2 * image_tokens**2 * width + 3 * width**2
    last_text_saved = (1 + 2 * MLP_RATIO) * width**2 * text_tokens + 4 * width**2  # it only gives q, k and v
    embed = (
        image_tokens * patch * width
        + text_tokens * config.context_dim * width
        + (SINUSOID_CHANNELS + config.pooled_dim + 2 * width) * width
    )
    final = image_tokens * width * patch + 2 * width**2
    return 2.0 * (config.depth * block + config.dual_attention_blocks * dual - last_text_saved + embed + final)
