"""The MM-DiT's own: its sizes, its start, its last block, what it refuses. What it shares is in test_backbones.py."""

import pytest
import torch
from small_models import small_config, small_inputs

from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit import MMDiT, MMDiTConfig
from sd3core.mmdit.layers import JointBlock, timestep_sinusoid


@pytest.mark.parametrize(
    ("depth", "plain", "with_qk_norm"),
    [
        (15, 496_066_624, 496_070_464),
        (18, 856_159_552, 856_164_160),
        (21, 1_358_950_720, 1_358_956_096),
        (24, 2_028_328_000, 2_028_334_144),
        (30, 3_962_392_384, 3_962_400_064),
        (38, 8_056_617_792, 8_056_627_520),
    ],
)
def test_parameter_counts_are_the_papers(depth, plain, with_qk_norm):
    for qk_norm, expected in ((None, plain), ("rms", with_qk_norm)):
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig.from_depth(depth, qk_norm=qk_norm, position_max=1))
        assert sum(p.numel() for p in model.parameters()) == expected


def test_depth_24_has_the_released_tensors():
    with torch.device("meta"):
        state = MMDiT(MMDiTConfig.from_depth(24)).state_dict()
    assert len(state) == 491
    assert state["pos_embed"].shape == (1, 36864, 1536)
    assert state["joint_blocks.23.context_block.adaLN_modulation.1.weight"].shape == (3072, 1536)
    assert "joint_blocks.23.context_block.attn.proj.weight" not in state
    assert sum(t.numel() for t in state.values()) == 2_084_951_104


def test_timestep_sinusoid_golden():
    code = timestep_sinusoid(torch.tensor([0.5]))[0]
    torch.testing.assert_close(code[:4], torch.tensor([-0.883849, 0.945946, 0.848507, 0.698697]), atol=2e-5, rtol=0)
    sines = torch.tensor([-0.467772, 0.324325, -0.529184, 0.715418])
    torch.testing.assert_close(code[128:132], sines, atol=2e-5, rtol=0)
    torch.testing.assert_close(code[[127, 255]], torch.tensor([0.998557, 0.053705]), atol=2e-5, rtol=0)


def test_a_fresh_block_is_the_identity():
    model = MMDiT(small_config())
    x, c, y = torch.randn(2, 6, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
    x_out, c_out = model.joint_blocks[0](x, c, y)
    assert torch.equal(x_out, x) and torch.equal(c_out, c)


def test_joint_attention_lets_text_reach_the_image_and_only_the_last_block_drops_text():
    block = JointBlock(128, 2, None, last=True)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, c, y = torch.randn(1, 6, 128), torch.randn(1, 5, 128), torch.randn(1, 128)
    x_a, c_a = block(x, c, y)
    x_b, _ = block(x, c + 1.0 * torch.randn_like(c), y)
    assert torch.equal(c_a, c) and (x_a - x_b).abs().max() > 1e-4


def test_refusals():
    model = MMDiT(small_config())
    latent, t, context, pooled = small_inputs()
    with pytest.raises(DataError, match="patch size"):
        model(latent[:, :, :5], t, context, pooled)
    with pytest.raises(DataError, match="position table"):
        model(torch.zeros(2, 16, 40, 8), t, context, pooled)
    with pytest.raises(CheckpointError, match="unknown key 'hidden_sise'; did you mean 'hidden_size'"):
        MMDiTConfig.from_dict({"hidden_sise": 3})
    with pytest.raises(CheckpointError, match="qk_norm"):
        MMDiTConfig.from_depth(2, qk_norm="layer")
    config = small_config(qk_norm="rms")
    assert MMDiTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0), ("depth", "2"), ("dual_attention_blocks", None), ("patch_size", 0), ("latent_channels", 0),
        ("context_dim", 1.5), ("pooled_dim", -1), ("clip_tokens", 0), ("depth", True),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_named(field, value):
    with pytest.raises(CheckpointError, match=f"model config: {field} is {value!r}; it is a whole number from"):
        MMDiTConfig.from_dict(small_config().to_dict() | {field: value})
