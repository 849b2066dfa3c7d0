"""MM-DiT with weights of their own for CLIP, T5 and image tokens."""

import pytest
import torch
from small_models import CLIP_TOKENS, randomise, small_config, small_inputs

from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit import MMDiT, MMDiTConfig

TWO_STREAMS = {
    15: 496_066_624,
    18: 856_159_552,
    21: 1_358_950_720,
    24: 2_028_328_000,
    30: 3_962_392_384,
    38: 8_056_617_792,
}


@pytest.mark.parametrize("depth", TWO_STREAMS)
def test_parameter_counts(depth):
    """A third set of every weight in the blocks; in the last block it has modulation and q, k, v only. sd3-facts 3.5."""
    h = 64 * depth
    expected = TWO_STREAMS[depth] + (depth - 1) * (18 * h * h + 15 * h) + 5 * h * h + 5 * h
    for qk_norm, norms in ((None, 0), ("rms", 3 * 128 * depth)):
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig.from_depth(depth, qk_norm=qk_norm, clip_tokens=77, position_max=1))
        assert sum(p.numel() for p in model.parameters()) == expected + norms


@pytest.mark.parametrize("clip_tokens", [CLIP_TOKENS, 7])
@torch.no_grad()
def test_with_both_texts_tied_it_is_the_two_stream_model(clip_tokens):
    """Wherever the context splits, even where T5 has no token at all."""
    two = randomise(MMDiT(small_config(qk_norm="rms")))
    three = MMDiT(small_config(qk_norm="rms", clip_tokens=clip_tokens))
    state = two.state_dict()
    three.load_state_dict({n: state[n.replace("t5_block", "context_block")] for n in three.state_dict()})
    torch.testing.assert_close(three(*small_inputs()), two(*small_inputs()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_context_splits_at_clip_tokens():
    """T5's weights matter for the tokens after them, and for no other."""
    latent, t, context, pooled = small_inputs()
    model = randomise(MMDiT(small_config(clip_tokens=CLIP_TOKENS)))

    def out(part):
        return model(latent, t, part, pooled)

    only_clip, both = out(context[:, :CLIP_TOKENS]), out(context)
    for name, p in model.named_parameters():
        if "t5_block" in name:
            p.add_(0.1)
    assert torch.equal(out(context[:, :CLIP_TOKENS]), only_clip)
    assert (out(context) - both).abs().max() > 1e-2


def test_refusals():
    model = MMDiT(small_config(clip_tokens=8))
    with pytest.raises(DataError, match="a context of 7 tokens is shorter than clip_tokens 8"):
        model(*small_inputs())
    with pytest.raises(CheckpointError, match="clip_tokens is 0"):
        small_config(clip_tokens=0)
