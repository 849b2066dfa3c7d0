"""What holds for every backbone, MM-DiT with two streams or three and its rivals alike."""

import pytest
import torch
import torch.utils.checkpoint
from small_models import CLIP_TOKENS, SMALL_BACKBONES, randomise, small_inputs

from sd3core.backbone_config import CONFIGS
from sd3core.checkpoint import load_model, save_model
from sd3core.checkpoint_formats import to_diffusers, to_single_file
from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit import MMDiTConfig, config_from_dict, insert_qk_norm, make_model, max_attention_logit
from sd3core.mmdit.architectures import BACKBONES

every_backbone = pytest.mark.parametrize("name", SMALL_BACKBONES)


def small_model(name, **overrides):
    return randomise(make_model(SMALL_BACKBONES[name](**overrides)))


def test_every_architecture_is_tested():
    assert set(BACKBONES) == set(CONFIGS) == {SMALL_BACKBONES[name]().architecture for name in SMALL_BACKBONES}


@every_backbone
def test_a_fresh_model_gives_zero_and_begins_to_learn(name):
    model = make_model(SMALL_BACKBONES[name]())
    out = model(*small_inputs())
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters())


@every_backbone
def test_every_parameter_gets_a_gradient_but_the_last_text_queries(name):
    model = small_model(name, qk_norm="rms")
    model(*small_inputs()).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    text_streams = ["context_block", "t5_block"][: getattr(model.config, "streams", 1) - 1]
    assert without == [f"joint_blocks.2.{stream}.attn.ln_q.weight" for stream in text_streams]


@every_backbone
@torch.no_grad()
def test_time_and_text_are_heard_and_text_has_no_order(name):
    model = small_model(name)
    latent, t, context, pooled = small_inputs()
    out = model(latent, t, context, pooled)
    assert out.shape == latent.shape
    for heard in ((t.flip(0), context, pooled), (t, context + 1, pooled), (t, context, -pooled)):
        assert (model(latent, *heard) - out).abs().max() > 1e-2
    within_parts = torch.cat([context[:, :CLIP_TOKENS].flip(1), context[:, CLIP_TOKENS:].flip(1)], dim=1)
    torch.testing.assert_close(model(latent, t, within_parts, pooled), out, atol=1e-5, rtol=1e-4)
    across = (model(latent, t, context.flip(1), pooled) - out).abs().max()
    assert across > 1e-2 if name == "mmdit-3-streams" else across < 1e-4


@every_backbone
@torch.no_grad()
def test_patches_know_their_places_by_positions_alone_and_by_neighbours_in_uvit(name):
    model = small_model(name)
    latent, t, context, pooled = small_inputs()

    def with_patches_turned():
        """Shifted by two patches round the edge before the model, and back after it."""
        return model(latent.roll(4, dims=3), t, context, pooled).roll(-4, dims=3)

    out = model(latent, t, context, pooled)
    assert (with_patches_turned() - out).abs().max() > 1e-2
    model.pos_embed.zero_()
    out = model(latent, t, context, pooled)
    apart = (with_patches_turned() - out).abs().max()
    assert apart > 1e-2 if name == "uvit" else apart < 1e-4


@every_backbone
@torch.no_grad()
def test_sizes_up_to_the_position_table(name):
    model = small_model(name, depth=1)
    for height, width in ((2, 2), (4, 32), (32, 2), (10, 6)):
        inputs = small_inputs(1, height, width)
        assert model(*inputs).shape == inputs[0].shape
    with pytest.raises(DataError, match="position table"):
        model(*small_inputs(1, 34, 2))
    with pytest.raises(DataError, match="patch size"):
        model(*small_inputs(1, 4, 5))


@every_backbone
@torch.no_grad()
def test_samples_do_not_touch_each_other_and_bf16_follows(name):
    model = small_model(name, qk_norm="rms")
    latent, t, context, pooled = small_inputs()
    exact = model(latent, t, context, pooled)
    torch.testing.assert_close(model(latent[:1], t[:1], context[:1], pooled[:1]), exact[:1], atol=1e-5, rtol=1e-4)
    rounded = model.bfloat16()(latent, t, context, pooled)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.04


@every_backbone
def test_recomputing_activations_changes_no_gradient(name):
    model = small_model(name)
    inputs = small_inputs()
    model(*inputs).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    recomputed = []
    for block in model.recomputable():
        forward = block.forward

        def again(*a, forward=forward):
            recomputed.append(forward)
            return torch.utils.checkpoint.checkpoint(forward, *a, use_reentrant=False)

        block.forward = again
    model(*inputs).square().mean().backward()
    assert len(recomputed) >= model.config.depth
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)


@every_backbone
def test_a_tiny_batch_is_learnt(name):
    torch.manual_seed(0)
    model = make_model(SMALL_BACKBONES[name](depth=2, hidden_size=64, num_heads=1))
    latent, t, context, pooled = small_inputs(4, 4, 6)
    target = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(latent, t, context, pooled) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@every_backbone
def test_saved_and_loaded(name, tmp_path):
    model = small_model(name, qk_norm="rms")
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    assert torch.equal(again(*small_inputs()), model(*small_inputs()))


@every_backbone
def test_configs_as_they_are_stored(name):
    config = SMALL_BACKBONES[name](qk_norm="rms")
    assert config_from_dict(config.to_dict()) == config
    assert config.to_dict().get("architecture", "mmdit") == config.architecture


def test_a_config_from_before_there_were_other_architectures_is_an_mmdit():
    """Its fields, by which recipes and checkpoints of that time are fingerprinted."""
    config = SMALL_BACKBONES["mmdit"]()
    sizes = {"depth", "hidden_size", "num_heads", "patch_size", "latent_channels", "context_dim", "pooled_dim"}
    positions = {"position_base", "position_side", "position_max"}
    assert set(config.to_dict()) == sizes | positions | {"qk_norm", "clip_tokens"}
    assert isinstance(config_from_dict(config.to_dict()), MMDiTConfig)
    with pytest.raises(CheckpointError, match="architecture 'dot' is not one of mmdit, dit, cross_dit, uvit"):
        config_from_dict(config.to_dict() | {"architecture": "dot"})
    with pytest.raises(CheckpointError, match="architecture is 'dit', 'mmdit' is wanted here"):
        MMDiTConfig.from_dict(SMALL_BACKBONES["dit"]().to_dict())
    with pytest.raises(CheckpointError, match="hidden_size 96 is no multiple of 64"):
        SMALL_BACKBONES["uvit"](hidden_size=96)


@every_backbone
def test_qk_norm_can_be_inserted_and_logits_be_watched(name):
    model = small_model(name)
    attentions = len(max_attention_logit(model, *small_inputs()))
    assert attentions == {"mmdit-dual": 4, "cross_dit": 6, "uvit": 6}.get(name, 3)
    insert_qk_norm(model)
    assert model.state_dict().keys() == make_model(SMALL_BACKBONES[name](qk_norm="rms")).state_dict().keys()
    assert max_attention_logit(model, *small_inputs()).max() <= 8.0 + 1e-3


@pytest.mark.parametrize(
    ("name", "what"),
    [("mmdit-3-streams", "three-stream MM-DiT"), ("dit", "dit"), ("cross_dit", "cross_dit"), ("uvit", "uvit")],
)
def test_only_the_two_stream_mmdit_has_a_released_form(name, what):
    model = small_model(name)
    for convert in (to_diffusers, to_single_file):
        with pytest.raises(CheckpointError, match=f"^a {what} has no diffusers or single-file form"):
            convert(model)
