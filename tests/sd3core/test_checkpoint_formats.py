"""Weights to and from diffusers and single files; diffusers' own transformer is the independent implementation."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_models import randomise, small_inputs

from sd3core.checkpoint_formats import (
    diffusers_config,
    from_diffusers,
    from_diffusers_tensors,
    from_single_file,
    to_diffusers,
    to_single_file,
)
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT, MMDiTConfig

CONFIG = {"position_base": 16, "position_side": 16, "position_max": 24}


@pytest.mark.parametrize("qk_norm", [None, "rms"])
@torch.no_grad()
def test_diffusers_transformer_gives_the_same_velocity(qk_norm):
    model = randomise(MMDiT(MMDiTConfig.from_depth(3, qk_norm=qk_norm, context_dim=96, pooled_dim=80, **CONFIG)))
    reference = SD3Transformer2DModel(**diffusers_config(model.config)).eval()
    reference.load_state_dict(to_diffusers(model))  # strict: every key and shape, the position table included
    latent, t, context, pooled = small_inputs(height=20, width=26, tokens=154, config=model.config)
    expected = reference(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample
    assert (model(latent, t, context, pooled) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_from_diffusers_takes_sizes_from_shapes(qk_norm):
    positions = {"position_base": 16, "position_side": 32, "position_max": 48}
    config = MMDiTConfig.from_depth(2, qk_norm=qk_norm, context_dim=48, pooled_dim=40, **positions)
    model = randomise(MMDiT(config))
    again = from_diffusers(to_diffusers(model))
    assert again.config == config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_transformer_made_by_diffusers_loads():
    sizes = diffusers_config(MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, position_max=24))
    reference = SD3Transformer2DModel(**sizes).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = from_diffusers(reference.state_dict())
    latent, t, context, pooled = small_inputs(height=10, width=14, config=model.config)
    expected = reference(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample
    assert (model(latent, t, context, pooled) - expected).abs().max() < 1e-5


def test_released_config():
    sizes = diffusers_config(MMDiTConfig.from_depth(24))
    assert sizes["sample_size"] == 128 and sizes["num_layers"] == 24 and sizes["pos_embed_max_size"] == 192
    assert sizes["caption_projection_dim"] == 1536 and sizes["joint_attention_dim"] == 4096 and sizes["qk_norm"] is None
    assert diffusers_config(MMDiTConfig.from_depth(38, qk_norm="rms"))["qk_norm"] == "rms_norm"


def test_single_file_round_trip_and_what_else_is_in_it():
    model = randomise(MMDiT(MMDiTConfig.from_depth(2, qk_norm="rms", context_dim=48, pooled_dim=40, **CONFIG)))
    state = to_single_file(model)
    assert "model.diffusion_model.joint_blocks.1.x_block.attn.ln_q.weight" in state
    state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    state["text_encoders.clip_l.transformer.x"] = torch.zeros(1)
    with pytest.warns(UserWarning, match="the VAE and the text encoders"):
        again = from_single_file(state)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_files_tell_their_positions():
    config = MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, position_max=192)
    again = from_single_file({name: tensor.half() for name, tensor in to_single_file(MMDiT(config)).items()})
    assert again.config == config and again.pos_embed.dtype == torch.float16


def test_a_foreign_position_table_is_kept_and_reported():
    state = to_single_file(MMDiT(MMDiTConfig.from_depth(2, context_dim=48, **CONFIG)))
    state["model.diffusion_model.pos_embed"] = torch.randn_like(state["model.diffusion_model.pos_embed"])
    with pytest.warns(UserWarning, match="position table"):
        model = from_single_file(state)
    assert torch.equal(model.pos_embed, state["model.diffusion_model.pos_embed"])


def test_problems_name_the_tensor():
    model = MMDiT(MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, **CONFIG))
    block, prefix = "transformer_blocks.0.", "model.diffusion_model."
    for convert, read, gone, odd in (
        (to_diffusers, from_diffusers, block + "attn.to_k.weight", block + "attn2.to_q.weight"),
        (to_single_file, from_single_file, prefix + "final_layer.linear.bias", prefix + "odd"),
    ):
        state = convert(model)
        with pytest.raises(CheckpointError, match=odd.removeprefix(prefix)):
            read(state | {odd: torch.zeros(1)})
        del state[gone]
        with pytest.raises(CheckpointError, match=gone.removeprefix(prefix)):
            read(state)
    with pytest.raises(CheckpointError, match="not an SD3 transformer"):
        from_single_file({"conv.weight": torch.zeros(1)})


def test_tensor_by_tensor_reads_each_source_once():
    reads = []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    state = Lazy(to_diffusers(MMDiT(MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, **CONFIG))))
    next(from_diffusers_tensors(state))
    assert reads == ["pos_embed.pos_embed"]
    reads.clear()
    assert len(dict(from_diffusers_tensors(state))) < len(state)
    assert sorted(reads) == sorted(state)
