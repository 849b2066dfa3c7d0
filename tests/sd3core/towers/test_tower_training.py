from __future__ import annotations

import numpy as np
import pytest
import torch
from small_towers import TINY, drawings

from sd3core.optim import QUINTICS, SMALLEST, orthogonalise
from sd3core.towers.training.clip import WordSwaps, build_clip, contrastive_loss, train_clip
from sd3core.towers.training.muon import TowerMuon
from sd3core.towers.training.schedule import ramp_and_fade, split_held_apart
from sd3core.towers.training.t5 import corrupt, train_t5
from sd3core.towers.training.tokenizers import make_clip_tokenizer, make_t5_tokenizer
from sd3core.towers.training.vae import build_vae

CAPTIONS = ["a red circle and a blue square", "a blue circle and a red square", "two green stars", "a red star"] * 4


@pytest.mark.parametrize("pad_with_id_0", [False, True])
def test_clip_tokenizer_has_tokens_for_any_text_and_its_own_pad(pad_with_id_0: bool):
    tokenizer = make_clip_tokenizer(CAPTIONS, 600, pad_with_id_0)
    assert len(tokenizer) <= 600 and tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.pad_token_id == (0 if pad_with_id_0 else tokenizer.eos_token_id)
    ids = tokenizer("Ünïcode 東京 don't 12!").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    assert len(tokenizer("a red circle").input_ids) == 5  # frequent words are single tokens


def test_t5_tokenizer_has_t5s_marks_in_t5s_places():
    tokenizer = make_t5_tokenizer(CAPTIONS, 300)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer("a red circle").input_ids[-1] == 1 and len(tokenizer("a red circle").input_ids) == 4
    assert 2 not in tokenizer("Quite unknown words, 42!").input_ids


def test_corruption_can_be_undone():
    generator = np.random.default_rng(0)
    sentinels = list(range(1000, 1100))
    for length in (0, 1, 2, 5, 12, 60):
        tokens = list(range(10, 10 + length))
        given, target = corrupt(tokens, sentinels, 1, generator)
        assert given[-1] == target[-1] == 1
        fills, current = {}, None
        for token in target[:-1]:
            if token >= 1000:
                current = fills.setdefault(token, [])
            else:
                current.append(token)
        restored = [t for token in given[:-1] for t in (fills[token] if token >= 1000 else [token])]
        assert restored == tokens
        assert not tokens or fills


def test_swaps_exchange_words_of_one_kind():
    swaps = WordSwaps(CAPTIONS)
    generator = np.random.default_rng(0)
    got = {swaps.swap("a red circle and a blue square", generator) for _ in range(40)}
    assert got == {"a blue circle and a red square", "a red square and a blue circle"}
    assert swaps.swap("two green stars", generator) == "two green stars"


def test_contrastive_loss_of_perfect_and_of_blind_features():
    size = 6
    same = torch.eye(size).repeat(1, 2)[:, : 2 * size].bool()
    same[:, size:] = False
    perfect = torch.cat([100 * torch.eye(size), torch.zeros(size, size)], dim=1)
    assert contrastive_loss(perfect, same) < 1e-6
    blind = torch.zeros(size, 2 * size)
    assert torch.isclose(
        contrastive_loss(blind, same), torch.tensor(0.5 * np.log(2 * size) + 0.5 * np.log(size)).float()
    )


def test_equal_captions_do_not_count_against_each_other():
    logits = torch.full((2, 4), 5.0)
    same = torch.tensor([[True, True, False, False]] * 2)
    logits[:, 2:] = -100.0
    assert contrastive_loss(logits, same) < 1e-6


def test_small_text_sides_are_scaled_to_rms_1_without_changing_the_pooled_vector():
    pictures, captions = drawings(12)
    tokenizer = make_clip_tokenizer(captions, 600, False)
    torch.manual_seed(0)
    clip = build_clip(TINY.clip_l, tokenizer, identity_projection=True, activation="quick_gelu")
    assert torch.equal(clip.text_projection.weight, torch.eye(32))
    train_clip(TINY.clip_l, clip, tokenizer, pictures, captions, 0)
    assert torch.equal(clip.text_projection.weight, torch.eye(32))
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    states = clip.text_model(encoded.input_ids, output_hidden_states=True).hidden_states[-2]
    assert abs(states[encoded.attention_mask.bool()].square().mean().sqrt() - 1) < 1e-3


def test_t5_features_have_rms_1():
    captions = drawings(12)[1]
    tokenizer = make_t5_tokenizer(captions, 300)
    encoder, figures = train_t5(TINY.t5, tokenizer, captions, 0)
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    features = encoder(encoded.input_ids).last_hidden_state[encoded.attention_mask.bool()]
    assert abs(features.square().mean().sqrt() - 1) < 1e-3 and figures["steps"] == TINY.t5.steps


def turned(shape: tuple[int, int], singular_values: torch.Tensor) -> torch.Tensor:
    """A matrix of those singular values."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return u * singular_values @ vh


def quintics_of(x: torch.Tensor) -> torch.Tensor:
    for a, b, c in QUINTICS:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16)])
def test_orthogonalise_levels_the_singular_values(shape, dtype):
    values = torch.logspace(0, -1, min(shape))
    values[-1] = 1.02 * SMALLEST * values.norm()
    matrix = turned(shape, values)
    direction = orthogonalise(matrix.to(dtype)).float()
    slack = 0.01 if dtype == torch.float32 else 0.06
    levelled = torch.linalg.svdvals(direction)
    assert 0.72 - slack < levelled.min() and levelled.max() < 1.28 + slack
    if dtype == torch.float32:  # the directions are the matrix's own
        expected = quintics_of(values / values.norm())
        torch.testing.assert_close(direction, turned(shape, expected), atol=2e-5, rtol=0)


def test_each_polynomial_is_the_nearest_to_1_on_its_interval():
    """Chebyshev: the best one errs by as much at four places, below and above in turn."""
    low, high = SMALLEST, 1.01
    for a, b, c in QUINTICS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        turns = error[1:-1][(error[1:-1] - error[:-2]) * (error[1:-1] - error[2:]) > 0]  # the extrema inside
        extrema = torch.stack([error[0], *turns, error[-1]])
        largest = error.abs().max()
        assert len(extrema) == 4 and (extrema * torch.tensor([-1, 1, -1, 1]) > 0.99 * largest).all()
        low, high = float(1 - largest), float(1.01 * (1 + largest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_orthogonalise_of_a_single_direction_does_not_shoot_up(noise, dtype):
    """Its singular value is the whole norm, and rounding can push it beyond."""
    for seed in range(20):
        torch.manual_seed(seed)
        matrix = torch.randn(32, 1) @ torch.randn(1, 96) + noise * torch.randn(32, 96)
        values = torch.linalg.svdvals(orthogonalise(matrix.to(dtype)).float())
        assert 0.7 < values[0] < 1.3


def test_muon_solves_least_squares():
    torch.manual_seed(0)
    target, weight = torch.randn(4, 6), torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = TowerMuon([weight], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * ramp_and_fade(step, 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.05


def test_a_fresh_vae_passes_its_picture_nearly_linearly():
    """Residual branches start at zero and the posterior starts quiet."""
    vae = build_vae(TINY.vae)
    posterior = vae.encode(torch.rand(2, 3, 32, 32)).latent_dist
    assert posterior.std.max() < 0.1 < posterior.mean.std()
    assert not vae.encoder.down_blocks[0].resnets[0].conv2.weight.any()


def test_schedule_and_split():
    factors = [ramp_and_fade(step, 100) for step in range(100)]
    assert max(factors) == 1.0 and factors[-1] < 1e-3 and factors[0] == pytest.approx(0.2)
    for rows in (1, 2, 10, 2048):
        training, held = split_held_apart(rows)
        assert len(training) and len(held)
        assert rows == 1 or not set(training) & set(held)
