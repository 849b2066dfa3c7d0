from __future__ import annotations

import numpy as np
import pytest
import torch

from sd3core.conditioning import ENCODERS, TextFeatures, drop_mask, join_features


def features(batch: int = 3, seed: int = 0) -> TextFeatures:
    torch.manual_seed(seed)
    return TextFeatures(
        clip_l=torch.randn(batch, 5, 4),
        clip_g=torch.randn(batch, 5, 6),
        t5=torch.randn(batch, 7, 12),
        clip_l_pooled=torch.randn(batch, 4),
        clip_g_pooled=torch.randn(batch, 3),
        lengths=torch.tensor([[2, 3, 4]]).repeat(batch, 1),
    )


def test_clip_comes_first_and_channels_are_padded():
    f = features()
    context, pooled = join_features(f, context_dim=16)
    assert context.shape == (3, 12, 16) and pooled.shape == (3, 7)
    assert torch.equal(context[:, :5, :4], f.clip_l) and torch.equal(context[:, :5, 4:10], f.clip_g)
    assert torch.equal(context[:, 5:, :12], f.t5)
    assert not context[:, :5, 10:].any() and not context[:, 5:, 12:].any()
    assert torch.equal(pooled, torch.cat([f.clip_l_pooled, f.clip_g_pooled], dim=1))


@pytest.mark.parametrize("column", range(3))
def test_a_dropped_encoder_is_zero_in_sequence_and_pooled_and_nothing_else_changes(column: int):
    f = features()
    keep = torch.ones(3, 3, dtype=torch.bool)
    keep[1, column] = False
    context, pooled = join_features(f, keep, None, 12)
    whole, whole_pooled = join_features(f, context_dim=12)
    parts = {0: (slice(0, 5), slice(0, 4)), 1: (slice(0, 5), slice(4, 10)), 2: (slice(5, 12), slice(0, 12))}
    tokens, channels = parts[column]
    expected, expected_pooled = whole.clone(), whole_pooled.clone()
    expected[1, tokens, channels] = 0
    if column < 2:
        expected_pooled[1, slice(0, 4) if column == 0 else slice(4, 7)] = 0
    assert torch.equal(context, expected) and torch.equal(pooled, expected_pooled)


def test_with_null_features_a_wholly_dropped_row_is_the_null_row():
    f, null = features(), features(1, seed=1)
    keep = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    context, pooled = join_features(f, keep, null, 12)
    null_context, null_pooled = join_features(null, context_dim=12)
    assert torch.equal(context[1], null_context[0]) and torch.equal(pooled[1], null_pooled[0])
    assert torch.equal(context[0], join_features(f, context_dim=12)[0][0])


def test_too_small_context_dim_is_refused():
    with pytest.raises(ValueError, match="context_dim 10"):
        join_features(features(), context_dim=10)


def test_trimmed_keeps_real_tokens_only():
    f = features().trimmed()
    for name, length in zip(ENCODERS, (2, 3, 4), strict=True):
        sequence = getattr(f, name)
        assert sequence[:, :length].all() and not sequence[:, length:].any()
        assert not sequence[:, length:].signbit().any()  # the zeros that reading a trimmed row gives, to the bit


def test_another_precision_leaves_the_lengths_whole_numbers():
    half = features().to(torch.float16)
    assert half.t5.dtype == torch.float16 and half.lengths.dtype == torch.int64


def test_drop_mask_has_the_papers_rate_independently_and_is_a_function_of_its_arguments():
    ids = np.arange(20_000, dtype=np.int64)
    mask = drop_mask(0, 3, ids, 0.464)
    assert mask.shape == (20_000, 3) and mask.dtype == torch.bool
    assert torch.allclose(mask.float().mean(0), torch.full((3,), 0.464), atol=0.015)
    assert abs(mask.all(1).float().mean() - 0.464**3) < 0.01  # about a tenth is wholly unconditional
    assert torch.equal(drop_mask(0, 3, ids[777:900], 0.464), mask[777:900])
    assert not torch.equal(drop_mask(0, 4, ids, 0.464), mask)


def test_encoders_may_be_dropped_together_besides():
    ids = np.arange(20_000, dtype=np.int64)
    alone, both = drop_mask(0, 3, ids, 0.1), drop_mask(0, 3, ids, 0.1, 0.2)
    assert torch.equal(both, alone | (both & ~alone).any(1, keepdim=True))
    assert abs(both.all(1).float().mean() - (0.2 + 0.8 * 0.1**3)) < 0.01
    assert torch.equal(drop_mask(0, 3, ids, 0.0, 0.2).sum(1).unique(), torch.tensor([0, 3]))
