"""The rivals' own parts: closed forms against MM-DiT, exact sizes, diffusers' blocks as independent implementations."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from small_models import SMALL_BACKBONES, randomise, small_config, small_inputs

from sd3core.mmdit import CrossDiTConfig, DiTConfig, MMDiT, UViTConfig, make_model
from sd3core.mmdit.layers import CrossBlock, SelfBlock
from sd3core.mmdit.rivals import ResidualBlock

LINEARS = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}


@torch.no_grad()
def test_dit_is_an_mmdit_whose_streams_are_tied():
    """MM-DiT's last text stream only gives q, k and v; what DiT makes of the text after that is read by nobody."""
    dit = randomise(make_model(SMALL_BACKBONES["dit"](qk_norm="rms")))
    mmdit = MMDiT(small_config(qk_norm="rms"))
    tied = {}
    for name, tensor in mmdit.state_dict().items():
        source = name.replace("joint_blocks.", "blocks.").replace("context_block.", "").replace("x_block.", "")
        tied[name] = dit.state_dict()[source][: len(tensor)]  # shift and scale come first of the modulation's six
    mmdit.load_state_dict(tied)
    torch.testing.assert_close(dit(*small_inputs()), mmdit(*small_inputs()), atol=1e-5, rtol=1e-4)


def embedders_and_output(h: int) -> int:
    """sd3-facts 3.5."""
    vectors = (256 * h + h + h * h + h) + (2048 * h + h + h * h + h)
    return 65 * h + vectors + 4097 * h + (2 * h * h + 2 * h) + (64 * h + 64)


@pytest.mark.parametrize("depth", [15, 24, 38])
def test_exact_sizes(depth):
    h = 64 * depth
    stream_block = 18 * h * h + 15 * h
    cross = 4 * h * h + 4 * h
    c = h // 4

    def conv(channels: int, out: int, side: int = 3) -> int:
        return side * side * channels * out + out

    modulation = (h + 1) * 2 * c
    down = 2 * c + conv(c, c) + 2 * c + conv(c, c) + modulation
    up = 4 * c + conv(2 * c, c) + 2 * c + conv(c, c) + modulation + conv(2 * c, c, 1)
    patches = (4 * c * h + h) + (4 * c * h + 4 * c) - 65 * h - (64 * h + 64)  # in place of the latent's
    unet = conv(16, c) + 2 * down + 2 * up + 2 * c + conv(c, 16) + patches
    expected = {
        DiTConfig: depth * stream_block,
        CrossDiTConfig: depth * (stream_block + cross),
        UViTConfig: depth * (stream_block + cross) + unet,
    }
    for kind, blocks in expected.items():
        with torch.device("meta"):
            plain, normed = (make_model(kind.from_depth(depth, qk_norm=norm, position_max=1)) for norm in (None, "rms"))
        count, with_norm = (sum(p.numel() for p in model.parameters()) for model in (plain, normed))
        assert count == embedders_and_output(h) + blocks
        assert with_norm - count == depth * 128 * (1 if kind is DiTConfig else 2)


def diffusers_block(block: SelfBlock, cross: bool) -> BasicTransformerBlock:
    """PixArt's block with our weights; its shared modulation is zero, so that what it is given is used as it is."""
    reference = BasicTransformerBlock(
        128,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128 if cross else None,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    own, state = block.state_dict(), {"scale_shift_table": torch.zeros(6, 128)}
    for kind in ("weight", "bias"):
        state |= {f"{there}.{kind}": own[f"{here}.{kind}"] for there, here in LINEARS.items()}
        for letter, part in zip("qkv", own[f"attn.qkv.{kind}"].chunk(3), strict=True):
            state[f"attn1.to_{letter}.{kind}"] = part
        if cross:
            state[f"attn2.to_q.{kind}"], state[f"attn2.to_out.0.{kind}"] = (
                own[f"cross.q.{kind}"],
                own[f"cross.proj.{kind}"],
            )
            state[f"attn2.to_k.{kind}"], state[f"attn2.to_v.{kind}"] = own[f"cross.kv.{kind}"].chunk(2)
    reference.load_state_dict(state)  # strict
    return reference


@pytest.mark.parametrize("kind", [SelfBlock, CrossBlock])
@torch.no_grad()
def test_transformer_blocks_are_those_of_diffusers(kind):
    block = randomise(kind(128, 2, None))
    x, c, y = torch.randn(2, 12, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
    cross = kind is CrossBlock
    reference = diffusers_block(block, cross)
    expected = reference(x, encoder_hidden_states=c if cross else None, timestep=block.adaLN_modulation(y))
    torch.testing.assert_close(block(x, c, y) if cross else block(x, y), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [32, 64])
@torch.no_grad()
def test_the_residual_block_is_that_of_diffusers(channels):
    block = randomise(ResidualBlock(channels, 32, 128))
    reference = ResnetBlock2D(
        in_channels=channels, out_channels=32, temb_channels=128, groups=channels // 16, groups_out=2, eps=1e-6,
        time_embedding_norm="scale_shift",
    ).eval()  # fmt: skip
    state = {}
    for name, tensor in block.state_dict().items():
        if name.startswith("adaLN"):  # diffusers: scale before shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        state[name.replace("adaLN_modulation.1", "time_emb_proj").replace("skip", "conv_shortcut")] = tensor
    reference.load_state_dict(state)
    x, y = torch.randn(2, channels, 6, 4), torch.randn(2, 128)
    torch.testing.assert_close(block(x, y), reference(x, y), atol=1e-5, rtol=1e-4)


def test_fresh_blocks_are_the_identity():
    x, c, y = torch.randn(2, 6, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
    assert torch.equal(make_model(SMALL_BACKBONES["dit"]()).blocks[0](x, y), x)
    for name in ("cross_dit", "uvit"):
        assert torch.equal(make_model(SMALL_BACKBONES[name]()).blocks[0](x, c, y), x)
    image = torch.randn(2, 32, 4, 6)
    assert torch.equal(make_model(SMALL_BACKBONES["uvit"]()).down[0](image, y), image)
