"""Weights to and from diffusers and single files; diffusers' own transformer is the independent implementation."""

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_models import randomise, small_inputs

from sd3core.checkpoint import model_shapes
from sd3core.checkpoint_formats import (
    DIFFUSERS,
    SINGLE_FILE,
    SINGLE_FILE_PREFIX,
    config_of_shapes,
    diffusers_config,
    from_diffusers,
    from_diffusers_tensors,
    from_single_file,
    to_diffusers,
    to_diffusers_tensors,
    to_single_file,
)
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT, MMDiTConfig

CONFIG = {"position_base": 16, "position_side": 16, "position_max": 24}


KINDS = [{}, {"qk_norm": "rms"}, {"qk_norm": "rms", "dual_attention_blocks": 1}]  # SD3, SD3.5-large, SD3.5-medium


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_diffusers_transformer_gives_the_same_velocity(kind):
    model = randomise(MMDiT(MMDiTConfig.from_depth(3, context_dim=96, pooled_dim=80, **kind, **CONFIG)))
    reference = SD3Transformer2DModel(**diffusers_config(model.config)).eval()
    reference.load_state_dict(to_diffusers(model))  # strict: every key and shape, the position table included
    latent, t, context, pooled = small_inputs(height=20, width=26, tokens=154, config=model.config)
    expected = reference(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample
    assert (model(latent, t, context, pooled) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_from_diffusers_takes_sizes_from_shapes(kind):
    positions = {"position_base": 16, "position_side": 32, "position_max": 48}
    config = MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, **kind, **positions)
    model = randomise(MMDiT(config))
    again = from_diffusers(to_diffusers(model))
    assert again.config == config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_converter_of_single_files_gives_the_same(kind):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = randomise(MMDiT(MMDiTConfig.from_depth(3, context_dim=48, pooled_dim=40, **kind, **CONFIG)))
    expected, ours = convert_sd3_transformer_checkpoint_to_diffusers(to_single_file(model)), to_diffusers(model)
    assert expected.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


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


def small(**changes) -> MMDiT:
    return MMDiT(MMDiTConfig.from_depth(2, **({"context_dim": 48, "pooled_dim": 40} | CONFIG | changes)))


@pytest.mark.parametrize("form", ["diffusers", "single file"])
def test_problems_name_every_tensor(form):
    convert, read = {"diffusers": (to_diffusers, from_diffusers), "single file": (to_single_file, from_single_file)}[
        form
    ]
    state = convert(small(qk_norm="rms"))
    names = sorted(state)
    gone = [name for name in names if "mlp.fc2" in name or "ff.net.2" in name]
    bent = [name for name in names if name.endswith(("attn.norm_added_k.weight", "context_block.attn.ln_k.weight"))]
    broken = {name: tensor for name, tensor in state.items() if name not in gone}
    odd = {name.replace(".0.", ".0.odd."): torch.zeros(1) for name in names if ".0." in name}
    with pytest.raises(CheckpointError) as error:
        read(broken | odd | {name: torch.zeros(63) for name in bent})
    message = str(error.value)
    assert "\n" not in message and message.count(", ...") >= 1
    assert f"{len(gone)} tensors missing: {', '.join(map(repr, gone[:3]))}" in message
    assert f"{len(odd)} tensors unknown: {', '.join(map(repr, sorted(odd)[:3]))}, ..." in message
    assert f"2 tensors of another shape: {bent[0]!r} (63,) instead of (64,), {bent[1]!r} (63,)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear() or s.update({"conv.weight": torch.zeros(1)}), "not an SD3 transformer"),
        (lambda s: s.update({"joint_blocks.999999.x_block.attn.proj.bias": torch.zeros(1)}), "not an SD3 transformer"),
        (lambda s: s.update({"joint_blocks.9.odd": torch.zeros(1)}), "tensors missing: .*joint_blocks"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(3)}), r"'.*proj.weight' has shape \(3,\)"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(130, 16, 2, 2)}), "hidden size 130 is no multiple"),
        (lambda s: s.pop("x_embedder.proj.weight"), "'.*x_embedder.proj.weight' missing"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 575, 128)}), r"\(1, 575, 128\) instead of \(1, 576, 128\)"),
        (lambda s: s.update({"context_embedder.weight": torch.zeros(128, 0)}), "has shape"),
        (
            lambda s: s.update({"joint_blocks.1.x_block.attn2.proj.bias": torch.zeros(128)}),
            "attn2.* missing|missing.*attn2",
        ),
    ],
)
def test_weights_that_are_no_model_are_refused(change, message):
    state = small().state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        from_single_file({"model.diffusion_model." + name: tensor for name, tensor in state.items()})


def test_a_table_that_is_not_finite_is_foreign():
    state = to_single_file(small())
    state["model.diffusion_model.pos_embed"][:] = float("nan")
    with pytest.warns(UserWarning, match="position table"):
        from_single_file(state)


@pytest.mark.parametrize("row", [0, 11, 23])
def test_every_row_of_a_table_is_looked_at(row):
    state = to_single_file(small())
    state["model.diffusion_model.pos_embed"][0, row * 24 + 3, 100] += 0.5
    with pytest.warns(UserWarning, match="position table"):
        from_single_file(state)


RELEASED = {  # MMDiTConfig, and what the released transformer/config.json says where it is not SD3-medium's
    "SD3-medium": (MMDiTConfig.from_depth(24), {}, 491, 2_084_951_104),
    "SD3.5-medium": (
        MMDiTConfig.from_depth(24, qk_norm="rms", dual_attention_blocks=13, position_max=384),
        {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
        491 + 24 * 4 + 13 * 6,
        2_243_171_520 + 226_492_416,
    ),
    "SD3.5-large": (
        MMDiTConfig.from_depth(38, qk_norm="rms"),
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        38 * 20 - 6 + 17 + 38 * 4,
        8_056_627_520 + 192**2 * 2432,
    ),
}
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}


@pytest.fixture(scope="module", params=RELEASED)
def released(request):
    """(config, diffusers' own transformer of the released sizes on the meta device, number of tensors, of elements)."""
    config, changes, tensors, elements = RELEASED[request.param]
    sizes = SD3_MEDIUM | changes
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.models.embeddings.get_2d_sincos_pos_embed", meta_table)
        return config, SD3Transformer2DModel(**sizes), tensors, elements


def meta_table(width: int, side: int, **_) -> torch.Tensor:
    return torch.empty(side * side, width, device="meta")


def test_released_names_and_shapes_are_those_of_diffusers(released):
    config, reference, tensors, elements = released
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert DIFFUSERS.shapes(config) == theirs
    assert config_of_shapes(theirs, DIFFUSERS, "x") == config
    stated = {name: reference.config[name] for name in diffusers_config(config)}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in stated.items()} == diffusers_config(config)
    single = SINGLE_FILE.shapes(config)
    assert (len(single), sum(map(math.prod, single.values()))) == (tensors, elements)
    assert config_of_shapes(single, SINGLE_FILE, "x") == config
    assert {SINGLE_FILE_PREFIX + name for name in model_shapes(config)} == single.keys()


def test_released_sizes_go_to_diffusers_and_back(released):
    """On the meta device: the mapping itself makes the shapes, in both directions."""
    config, reference, _, _ = released
    theirs = dict(
        to_diffusers_tensors(
            ((n, torch.empty(s, device="meta")) for n, s in model_shapes(config).items()), config.depth
        )
    )
    reference.load_state_dict(theirs, assign=True)
    ours = {name: tuple(tensor.shape) for name, tensor in from_diffusers_tensors(theirs)}
    assert ours == model_shapes(config)


def test_tensor_by_tensor_reads_each_source_once():
    reads = []

    class Lazy(dict):
        @property
        def shapes(self):
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    state = Lazy(to_diffusers(MMDiT(MMDiTConfig.from_depth(2, context_dim=48, pooled_dim=40, **CONFIG))))
    next(from_diffusers_tensors(state))
    assert len(reads) == 1
    reads.clear()
    assert len(dict(from_diffusers_tensors(state))) < len(state)
    assert sorted(reads) == sorted(state)
