"""QK-norm inserted into a model trained without it: what stays, how near the first forward is, and the logits it bounds."""

import copy

import pytest
import torch
from small_models import randomise, small_config, small_inputs

from sd3core.mmdit import MMDiT, insert_qk_norm, max_attention_logit
from sd3core.mmdit.layers import RMSNorm
from sd3core.mmdit.qk_norm import fitted_scale, inserted_norms, norms_passed_by


def model_with_logits(factor: float) -> MMDiT:
    """Queries and keys `factor` times as long as those of a random model, whose RMS is about one."""
    model = randomise(MMDiT(small_config()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name:
                p[: 2 * len(p) // 3] *= factor
    return model


def moved(model: MMDiT, changed: MMDiT, inputs) -> float:
    """|change of the velocity| / |velocity|."""
    before = model(*inputs)
    return ((changed(*inputs) - before).norm() / before.norm()).item()


def test_weights_stay_and_scales_are_one_or_fitted():
    model = randomise(MMDiT(small_config()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, fitted = insert_qk_norm(copy.deepcopy(model)), insert_qk_norm(copy.deepcopy(model), small_inputs())
    for after in (plain.state_dict(), fitted.state_dict()):
        assert after.keys() == MMDiT(small_config(qk_norm="rms")).state_dict().keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    scales = plain.state_dict().keys() - before.keys()
    assert plain.config.qk_norm == fitted.config.qk_norm == "rms"
    assert all((plain.state_dict()[name] == 1).all() for name in scales)
    assert all((fitted.state_dict()[name] != 1).any() for name in scales)
    assert insert_qk_norm(plain) is plain
    assert not any(module._forward_hooks for module in fitted.modules())


def norm_with_scale_of(z: torch.Tensor) -> RMSNorm:
    """z (tokens, heads, d)."""
    norm = RMSNorm(z.shape[-1])
    with norms_passed_by({"it": norm}) as sums:
        assert norm(z) is z  # inside, the norm is passed by
    norm.weight.data.copy_(fitted_scale(sums["it"]))
    return norm


@torch.no_grad()
def test_where_every_query_has_the_same_rms_nothing_changes():
    z = torch.nn.functional.normalize(torch.randn(40, 2, 64), dim=-1) * 24  # RMS 3
    torch.testing.assert_close(norm_with_scale_of(z)(z), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
@torch.no_grad()
def test_the_error_is_bounded_by_the_spread_of_the_rms(spread):
    """With one scalar w the squared error is sum (rms - w)^2 / sum rms^2, least at the mean: Var(rms) / E[rms^2].

    A scale for each channel can only be better than one for all, and better than scales of one.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = 3 * torch.exp(spread * torch.randn(400, 2, 1, generator=generator))
    z = torch.nn.functional.normalize(torch.randn(400, 2, 64, generator=generator), dim=-1) * 8 * lengths
    error = (norm_with_scale_of(z)(z) - z).norm() / z.norm()
    rms = z.square().mean(dim=-1).sqrt()
    bound = rms.std(correction=0) / rms.square().mean().sqrt()
    assert 0.9 * bound < error <= bound * (1 + 1e-5)
    assert error < (RMSNorm(64)(z) - z).norm() / z.norm()


@torch.no_grad()
def test_a_damaged_sample_spoils_only_itself():
    z = torch.randn(8, 2, 64)
    damaged = torch.cat([z, torch.full((1, 2, 64), torch.nan)])
    torch.testing.assert_close(norm_with_scale_of(damaged).weight, norm_with_scale_of(z).weight)
    assert torch.equal(norm_with_scale_of(damaged[8:]).weight, torch.ones(64))


@pytest.mark.parametrize(
    ("factor", "most", "plain_at_least"), [(0.25, 0.002, 0.05), (0.5, 0.01, 0.05), (1.0, 0.05, 0.05)]
)
@torch.no_grad()
def test_the_first_forward_is_near_the_old_one(factor, most, plain_at_least):
    """Measured: 0.1, 0.5 and 3.3 % with fitted scales, 9.8, 7.5 and 5.6 % with scales of one.

    The relative error of q and k is the same in all three; logits, and so their error, grow with the factor squared.
    """
    model, inputs = model_with_logits(factor), small_inputs(4, 16, 16, 12)
    fitted = moved(model, insert_qk_norm(copy.deepcopy(model), inputs), inputs)
    assert fitted < most
    assert moved(model, insert_qk_norm(copy.deepcopy(model)), inputs) > max(plain_at_least, fitted)


@torch.no_grad()
def test_scales_fitted_to_one_batch_serve_another():
    model = model_with_logits(0.5)
    fitted = insert_qk_norm(copy.deepcopy(model), small_inputs(4, 16, 16, 12))
    latent, t, context, pooled = small_inputs(4, 12, 20, 12)
    assert moved(model, fitted, (latent.flip(1), t.flip(0), context.roll(1, 2), -pooled)) < 0.01


def test_every_norm_is_found():
    norms = dict(inserted_norms(MMDiT(small_config(qk_norm="rms", dual_attention_blocks=1))))
    assert len(norms) == 3 * 4 + 2 and "joint_blocks.0.x_block.attn2.ln_k" in norms


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
