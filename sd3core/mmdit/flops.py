"""What a forward pass of a backbone costs, from its sizes alone. All counts are multiply-adds of one sample."""

from __future__ import annotations

from sd3core.backbone_config import BackboneConfig, CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig
from sd3core.mmdit.layers import MLP_RATIO, SINUSOID_CHANNELS

UVIT_KERNEL = 3 * 3  # of UViT's convolutions


def forward_flops(config: BackboneConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of one sample, 2 per multiply-add; a training step costs three times as many (backward: twice the forward).

    Counts linear maps, convolutions, modulations, q k^T and its product with v; no norms, no activations.
    """
    blocks = {"mmdit": _joint_blocks, "dit": _shared_blocks, "cross_dit": _cross_blocks, "uvit": _unet}
    inside = blocks[config.architecture](config, image_tokens, text_tokens)
    return 2.0 * (_embedding_and_output(config, image_tokens, text_tokens) + inside)


def _embedding_and_output(config: BackboneConfig, image_tokens: int, text_tokens: int) -> int:
    """Patches in and out, text, time, and the final layer's modulation."""
    width = config.hidden_size
    channels = config.conv_channels if isinstance(config, UViTConfig) else config.latent_channels
    patches = 2 * image_tokens * config.patch_size**2 * channels * width
    vectors = (SINUSOID_CHANNELS + config.pooled_dim + 2 * width) * width
    return patches + text_tokens * config.context_dim * width + vectors + 2 * width**2


def _stream(width: int, tokens: int, attended: int) -> int:
    """Self-attention among `attended` tokens, MLP and modulation of `tokens` of them with one set of weights."""
    return (3 + 1 + 2 * MLP_RATIO) * width**2 * tokens + 2 * attended * tokens * width + 6 * width**2


def _joint_blocks(config: MMDiTConfig, image_tokens: int, text_tokens: int) -> int:
    width, tokens, text_streams = config.hidden_size, image_tokens + text_tokens, config.streams - 1
    block = _stream(width, tokens, tokens) + text_streams * 6 * width**2
    dual = 4 * width**2 * image_tokens + 2 * image_tokens**2 * width + 3 * width**2
    # The last block's text streams only give q, k and v.
    last_text_saved = (1 + 2 * MLP_RATIO) * width**2 * text_tokens + text_streams * 4 * width**2
    return config.depth * block + config.dual_attention_blocks * dual - last_text_saved


def _shared_blocks(config: DiTConfig, image_tokens: int, text_tokens: int) -> int:
    tokens = image_tokens + text_tokens
    return config.depth * _stream(config.hidden_size, tokens, tokens)


def _cross_blocks(config: CrossDiTConfig | UViTConfig, image_tokens: int, text_tokens: int) -> int:
    width = config.hidden_size
    cross = 2 * width**2 * (image_tokens + text_tokens) + 2 * image_tokens * text_tokens * width
    return config.depth * (_stream(width, image_tokens, image_tokens) + cross)


def _unet(config: UViTConfig, image_tokens: int, text_tokens: int) -> int:
    channels, pixels = config.conv_channels, image_tokens * config.patch_size**2
    ends = 2 * UVIT_KERNEL * config.latent_channels * channels * pixels
    down = 2 * UVIT_KERNEL * channels**2 * pixels
    up = (3 * UVIT_KERNEL + 2) * channels**2 * pixels  # the first convolution and the skip read two maps
    modulation = 2 * 2 * channels * config.hidden_size
    return ends + config.conv_blocks * (down + up + modulation) + _cross_blocks(config, image_tokens, text_tokens)
