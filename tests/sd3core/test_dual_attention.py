"""The second attention of SD3.5-medium's first blocks; diffusers' own transformer is the independent implementation."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_models import randomise, small_config, small_inputs

from sd3core.checkpoint_formats import diffusers_config, to_diffusers_tensors
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT, MMDiTConfig, insert_qk_norm, max_attention_logit

SECOND_ATTENTION = {"qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",), "ln_q": ("norm_q",), "ln_k": ("norm_k",)}


def test_the_released_size():
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig.from_depth(24, qk_norm="rms", dual_attention_blocks=13, position_max=384))
    assert sum(p.numel() for p in model.parameters()) == 2_243_171_520
    state = model.state_dict()
    assert state["pos_embed"].numel() == 226_492_416
    second = {name for name in state if ".attn2." in name}
    kinds = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "ln_q.weight", "ln_k.weight")
    assert second == {f"joint_blocks.{i}.x_block.attn2.{kind}" for i in range(13) for kind in kinds}
    assert state["joint_blocks.12.x_block.adaLN_modulation.1.weight"].shape == (9 * 1536, 1536)
    assert state["joint_blocks.13.x_block.adaLN_modulation.1.weight"].shape == (6 * 1536, 1536)


@pytest.mark.parametrize("dual", [1, 3])
@torch.no_grad()
def test_diffusers_transformer_gives_the_same_velocity(dual):
    model = randomise(MMDiT(small_config(qk_norm="rms", dual_attention_blocks=dual)))
    sizes = diffusers_config(model.config) | {"dual_attention_layers": list(range(dual))}
    reference = SD3Transformer2DModel(**sizes).eval()
    first, second = {}, {}
    for name, tensor in model.state_dict().items():
        (second if ".attn2." in name else first)[name] = tensor
    state = dict(to_diffusers_tensors(first.items(), model.config.depth))
    for name, tensor in second.items():
        _, block, _, attention, part, kind = name.split(".")
        targets = SECOND_ATTENTION[part]
        for target, piece in zip(targets, tensor.chunk(len(targets)), strict=True):
            state[f"transformer_blocks.{block}.{attention}.{target}.{kind}"] = piece
    reference.load_state_dict(state)  # strict
    latent, t, context, pooled = small_inputs()
    expected = reference(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample
    assert (model(latent, t, context, pooled) - expected).abs().max() < 1e-5


def test_every_second_attention_learns_and_a_fresh_block_is_the_identity():
    fresh = MMDiT(small_config(dual_attention_blocks=2))
    x, c, y = torch.randn(2, 6, 128), torch.randn(2, 5, 128), torch.randn(2, 128)
    x_out, c_out = fresh.joint_blocks[0](x, c, y)
    assert torch.equal(x_out, x) and torch.equal(c_out, c)
    model = randomise(MMDiT(small_config(qk_norm="rms", dual_attention_blocks=2)))
    model(*small_inputs()).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".attn2." in name)


def test_without_qk_norm_it_can_be_inserted_and_its_logits_are_watched():
    model = randomise(MMDiT(small_config(dual_attention_blocks=2)))
    assert max_attention_logit(model, *small_inputs()).shape == (5,)  # two in each of the first two blocks
    insert_qk_norm(model)
    expected = MMDiT(small_config(qk_norm="rms", dual_attention_blocks=2)).state_dict().keys()
    assert model.state_dict().keys() == expected


def test_config():
    assert "dual_attention_blocks" not in small_config().to_dict()  # fingerprints and checkpoints stay as they were
    config = small_config(dual_attention_blocks=2)
    assert MMDiTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(CheckpointError, match="dual_attention_blocks 4"):
        small_config(dual_attention_blocks=4)
