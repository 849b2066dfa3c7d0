"""FLOPs of the towers by their sizes, against PyTorch's own count over the networks themselves."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from sd3core.recipe_file import load_recipe
from sd3core.towers.flops import RELEASED, Transformer, Vae, tower_sizes


def counted(call) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("channels, layers, height, width", [((8, 8, 16, 16), 1, 32, 32), ((8, 16, 32, 32), 2, 48, 64)])
def test_the_autoencoder(channels, layers, height, width):
    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.set_attn_processor(AttnProcessor())  # PyTorch does not count its fused attention on a CPU
    sizes = Vae(channels, layers)
    images, latents = torch.zeros(1, 3, height, width), torch.zeros(1, 16, height // 8, width // 8)
    assert counted(lambda: vae.encode(images)) == sizes.encode_flops(height, width)
    assert counted(lambda: vae.decode(latents)) == sizes.decode_flops(height, width)


def test_the_text_encoders():
    plain = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    clip = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, **plain)
    )
    t5 = T5EncoderModel(
        T5Config(d_model=64, d_kv=16, num_heads=4, d_ff=160, num_layers=2, feed_forward_proj="gated-gelu", **plain)
    )
    ids = torch.ones(1, 16, dtype=torch.long)
    assert counted(lambda: clip(ids)) == Transformer(32, 3, 128).flops(16)
    assert counted(lambda: t5(ids)) == Transformer(64, 2, 160, 3).flops(16)


def test_released_towers_are_read_where_they_are_and_assumed_where_not(tmp_path):
    recipe = load_recipe("sd3-2b")
    assert tower_sizes(recipe) == RELEASED
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 512, "num_layers": 6, "d_ff": 1024}))
    small = load_recipe("sd3-2b", [f"towers.released.t5={tmp_path}"])
    assert tower_sizes(small).t5 == Transformer(512, 6, 1024, 3)
    (tmp_path / "config.json").write_text("{")
    assert tower_sizes(small).t5 == RELEASED.t5


def test_the_released_vae_is_as_large_as_it_is_known_to_be():
    """SD3's encoder at 1024 px takes some 4.9 TFLOPs, its decoder more than twice as many."""
    encode, decode = RELEASED.vae.encode_flops(1024, 1024), RELEASED.vae.decode_flops(1024, 1024)
    assert 4e12 < encode < 6e12 and 2 * encode < decode < 3 * encode
