"""The MM-DiT: its sizes, its start, its gradients, what it refuses."""

import pytest
import torch
import torch.utils.checkpoint
from small_models import randomise, small_config, small_inputs

from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit import MMDiT, MMDiTConfig, insert_qk_norm, max_attention_logit
from sd3core.mmdit.layers import JointBlock, timestep_sinusoid


@pytest.mark.parametrize(
    ("depth", "plain", "with_qk_norm"),
    [
        (15, 496_066_624, 496_070_464),
        (18, 856_159_552, 856_164_160),
        (24, 2_028_328_000, 2_028_334_144),
        (38, 8_056_617_792, 8_056_627_520),
    ],
)
def test_parameter_counts_are_the_papers(depth, plain, with_qk_norm):
    for qk_norm, expected in ((None, plain), ("rms", with_qk_norm)):
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig.from_depth(depth, qk_norm=qk_norm))
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


def test_fresh_model_gives_zero_and_a_fresh_block_is_the_identity():
    model = MMDiT(small_config())
    assert model(*small_inputs()).abs().max() == 0
    x, c, y = torch.randn(2, 6, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
    x_out, c_out = model.joint_blocks[0](x, c, y)
    assert torch.equal(x_out, x) and torch.equal(c_out, c)


def test_every_parameter_gets_a_gradient_but_the_last_text_queries():
    """Nothing reads the last text output, so its queries are idle; released files have them, so they stay."""
    model = randomise(MMDiT(small_config(qk_norm="rms")))
    model(*small_inputs()).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == ["joint_blocks.2.context_block.attn.ln_q.weight"]
    assert all(p.grad is not None for p in model.parameters())  # ZeRO-3 needs every parameter in the graph


def test_joint_attention_lets_text_reach_the_image_and_only_the_last_block_drops_text():
    block = JointBlock(128, 2, None, last=True)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, c, y = torch.randn(1, 6, 128), torch.randn(1, 5, 128), torch.randn(1, 128)
    x_a, c_a = block(x, c, y)
    x_b, _ = block(x, c + 1.0 * torch.randn_like(c), y)
    assert torch.equal(c_a, c) and (x_a - x_b).abs().max() > 1e-4


def test_text_order_does_not_matter_but_patch_order_does():
    model = randomise(MMDiT(small_config()))
    latent, t, context, pooled = small_inputs()
    out = model(latent, t, context, pooled)
    torch.testing.assert_close(out, model(latent, t, context.flip(1), pooled), atol=1e-5, rtol=1e-4)
    assert (out - model(latent.flip(3), t, context, pooled).flip(3)).abs().max() > 1e-3


def test_bf16_follows_fp32_and_keeps_the_latents_dtype():
    model = randomise(MMDiT(small_config(qk_norm="rms")))
    inputs = small_inputs()
    exact = model(*inputs)
    rounded = model.bfloat16()(*inputs)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_samples_do_not_touch_each_other():
    model = randomise(MMDiT(small_config()))
    latent, t, context, pooled = small_inputs()
    alone = model(latent[:1], t[:1], context[:1], pooled[:1])
    torch.testing.assert_close(model(latent, t, context, pooled)[:1], alone, atol=1e-5, rtol=1e-4)


def test_blocks_can_be_checkpointed_from_outside():
    model = randomise(MMDiT(small_config()))
    inputs = small_inputs()
    model(*inputs).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.joint_blocks:
        forward = block.forward
        block.forward = lambda *a, forward=forward: torch.utils.checkpoint.checkpoint(forward, *a, use_reentrant=False)
    model(*inputs).square().mean().backward()
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_insert_qk_norm_keeps_the_weights_and_is_what_a_normed_model_has():
    model = randomise(MMDiT(small_config()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    insert_qk_norm(model)
    after = model.state_dict()
    assert after.keys() == MMDiT(small_config(qk_norm="rms")).state_dict().keys()
    assert model.config.qk_norm == "rms"
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all((after[name] == 1).all() for name in after.keys() - before.keys())
    assert insert_qk_norm(model) is model


def test_max_attention_logit_is_the_largest_entry():
    model = randomise(MMDiT(small_config()))
    inputs = small_inputs()
    plain = max_attention_logit(model, *inputs)
    assert plain.shape == (3,) and (plain > 0).all()
    with torch.no_grad():  # doubling queries doubles the logits of the block
        for stream in (model.joint_blocks[0].x_block, model.joint_blocks[0].context_block):
            stream.attn.qkv.weight[:128] *= 2
            stream.attn.qkv.bias[:128] *= 2
    torch.testing.assert_close(max_attention_logit(model, *inputs)[0], 2 * plain[0])
    assert not model.joint_blocks[0].attention._forward_pre_hooks
    # RMS-normed heads of scale one have length sqrt(d) at most, so no logit above sqrt(d)
    assert max_attention_logit(insert_qk_norm(model), *inputs).max() <= 8.0 + 1e-3


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
