"""How text features are stored: what comes back, how near it is, how many bytes it takes, and what training notices."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from small_towers import drawings

from sd3core.conditioning import ENCODERS, TextFeatures, join_features
from sd3core.costs.phases import RELEASED_WIDTHS, text_bytes
from sd3core.data.encoded_shards import latent_bytes
from sd3core.data.shards import TAR_BLOCK
from sd3core.data.stored_text import SCALE_GROUP, StoredText, dequantise, quantise
from sd3core.errors import DataError
from sd3core.metrics.validation_loss import level_losses, validation_loss
from sd3core.mmdit import MMDiTConfig, make_model
from sd3core.recipe import Text
from sd3core.recipe_file import load_recipe
from sd3core.rectified_flow import interpolate, velocity_target
from sd3core.towers.text_encoders import load_text_encoders

DTYPES = ("float32", "float16", "bfloat16", "int8")
PADDINGS = ("reference", "trimmed")
LEAST_COSINE = 0.999
# In 16 bits, of one caption and one image at 256 px: CLIP's sequences and pooled vectors, T5's sequence, the latent.
PLAIN_SAMPLE_BYTES = 2 * (77 * (768 + 1280) + (768 + 1280) + 77 * 4096 + 16 * 32 * 32)
TOWERS_TEXT = Text(clip_tokens=16, t5_tokens=16)


def ramps() -> TextFeatures:
    """One caption of widths below and above SCALE_GROUP, with values that 16 bits hold as they are."""

    def ramp(*shape: int) -> torch.Tensor:
        return ((torch.arange(math.prod(shape)) * 37 % 101 - 50) / 16).reshape(1, *shape)

    return TextFeatures(ramp(4, 6), ramp(4, 130), ramp(5, 260), ramp(6), ramp(3), torch.tensor([[2, 3, 4]]))


def read(*files: bytes, clip_tokens: int = 4, t5_tokens: int = 5) -> TextFeatures:
    return StoredText.from_bytes(files, clip_tokens=clip_tokens, t5_tokens=t5_tokens).features()


def equal(a: TextFeatures, b: TextFeatures) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TextFeatures.__dataclass_fields__)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_the_precision_holds_comes_back_whole_and_trimmed(dtype):
    stored = StoredText.of(ramps(), dtype)
    assert equal(read(stored.to_bytes("reference")), ramps())
    assert equal(read(stored.to_bytes("trimmed")), ramps().trimmed())


@pytest.mark.parametrize("dtype", DTYPES)
def test_trimmed_rows_are_the_whole_ones_of_the_same_precision_to_the_bit(towers_folder, dtype):
    """Of real towers: what they give with text.padding "trimmed", stored whole, and the real tokens of "reference"."""
    captions = drawings(6)[1]
    encoders = {p: load_text_encoders(towers_folder, TOWERS_TEXT.model_copy(update={"padding": p})) for p in PADDINGS}
    tokens = {"clip_tokens": 16, "t5_tokens": 16}
    made = {padding: StoredText.of(encoder.encode(captions), dtype) for padding, encoder in encoders.items()}
    rows = [made["trimmed"].index([i]) for i in range(6)]
    trimmed, whole = (StoredText.from_bytes([row.to_bytes(p) for row in rows], **tokens) for p in PADDINGS[::-1])
    assert trimmed.nbytes < whole.nbytes
    trimmed, whole, reference = (stored.features() for stored in (trimmed, whole, made["reference"]))
    for column, name in enumerate(ENCODERS):
        bits = [getattr(features, name).view(torch.int32) for features in (trimmed, whole, reference)]
        assert torch.equal(bits[0], bits[1])
        for row, length in enumerate(trimmed.lengths[:, column].tolist()):
            assert torch.equal(bits[0][row, :length], bits[2][row, :length]) and not bits[0][row, length:].any()
            assert bits[2][row, length:].any()  # what "trimmed" leaves out is not nothing: another preprocessing


def test_a_batch_holds_captions_of_several_lengths():
    rows = [StoredText.of(ramps(), "int8"), StoredText.of(doubled(ramps()), "int8")]
    both = StoredText.from_bytes(
        [rows[0].to_bytes("trimmed"), rows[1].to_bytes("reference")], clip_tokens=6, t5_tokens=7
    )
    assert len(both) == 2 and both.tensors["t5"].shape == (2, 5, 260) and both.tensors["t5"].dtype == torch.int8
    features = both.features()
    assert features.t5.shape == (2, 7, 260) and features.clip_g.shape == (2, 6, 130)
    assert torch.equal(features.t5[0, :4] * 2, features.t5[1, :4]) and not features.t5[0, 4:].any()
    assert not features.t5[1, 5:].any() and equal(both.index([1]).features(), read_long(rows[1].to_bytes("reference")))


def doubled(features: TextFeatures) -> TextFeatures:
    values = {name: 2 * getattr(features, name) for name in TextFeatures.__dataclass_fields__ if name != "lengths"}
    return TextFeatures(**values, lengths=features.lengths)


def read_long(data: bytes) -> TextFeatures:
    return read(data, clip_tokens=6, t5_tokens=7)


def test_bytes_that_do_not_fit_are_a_data_error():
    whole = StoredText.of(ramps(), "int8").to_bytes("reference")
    with pytest.raises(DataError, match="5 stored t5 tokens do not fit 4"):
        read(whole, t5_tokens=4)
    for damaged in (b"\0" * 64, whole.replace(b"t5_scales", b"t5_scalen")):
        with pytest.raises(DataError, match="cannot be read"):
            read(damaged)


@pytest.mark.parametrize(("dtype", "padding", "digest"), [
    ("float32", "reference", "e997c666aefbeb2c"), ("float32", "trimmed", "a4407dcbe71f7246"),
    ("float16", "reference", "d7648b9b53d4541c"), ("float16", "trimmed", "325974066170bb6f"),
    ("bfloat16", "reference", "a7b78b34233843c3"), ("bfloat16", "trimmed", "4647f8c8915533b5"),
    ("int8", "reference", "708166b17a5d3a20"), ("int8", "trimmed", "0396364c4fe70f5c"),
])  # fmt: skip
def test_golden_bytes(dtype, padding, digest):
    """What stands in stores was written so: where this fails, raise FORMATS["text"]."""
    assert hashlib.sha256(StoredText.of(ramps(), dtype).to_bytes(padding)).hexdigest()[:16] == digest


def token_cosines(values: torch.Tensor, group: int = SCALE_GROUP) -> torch.Tensor:
    return cosines(values, dequantise(*quantise(values, group), group))


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Without the least length that torch's has."""
    a, b = a.double(), b.double()
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def heavy_tailed(tokens: int = 256, width: int = 4096, seed: int = 0) -> torch.Tensor:
    """As T5-XXL's last layer: channels of unequal size, a few of them the same 30 to 200 times larger in every token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(0.5 * torch.randn(width, generator=generator))
    sizes[torch.randperm(width, generator=generator)[:6]] *= torch.tensor([30.0, 50.0, 70.0, 100.0, 150.0, 200.0])
    return 0.1 * sizes * torch.randn(tokens, width, generator=generator)


@pytest.mark.parametrize("width", [768, 1280, 4096, 4000])
def test_8_bits_hold_every_token_with_outlier_channels_where_one_scale_a_token_does_not(width):
    values = heavy_tailed(width=width)
    assert token_cosines(values).min() > LEAST_COSINE
    assert token_cosines(values, group=width).min() < (0.993 if width == 4096 else LEAST_COSINE)


def test_8_bits_hold_the_worst_values_there_are():
    """One channel sets the scale, all others lie just below half a step and are lost; also at the ends of float32."""
    largest = torch.linspace(1, 2, 257)[:, None]  # its scale is rounded up and down by all that bfloat16 rounds
    scales = quantise(largest.expand(-1, SCALE_GROUP))[1].float()
    lost = torch.cat([largest, (0.4999 * scales).expand(-1, SCALE_GROUP - 1)], dim=1)
    assert LEAST_COSINE < token_cosines(lost).min() < 0.99903  # so SCALE_GROUP is as large as it may be
    assert token_cosines(lost * 1e30).min() > LEAST_COSINE and token_cosines(lost * 1e-30).min() > LEAST_COSINE
    twice = token_cosines(
        torch.cat([largest, (0.4999 * scales).expand(-1, 2 * SCALE_GROUP - 1)], dim=1), 2 * SCALE_GROUP
    )
    assert twice.min() < LEAST_COSINE
    assert not dequantise(*quantise(torch.zeros(2, 300))).any()


def test_8_bits_hold_every_token_of_real_towers_and_float16_is_nearer_than_bfloat16(towers_folder):
    exact = load_text_encoders(towers_folder, TOWERS_TEXT).encode(drawings(32)[1])
    errors = {}
    for dtype in DTYPES:
        features = StoredText.of(exact, dtype).features()
        pairs = [(getattr(exact, name).double(), getattr(features, name).double()) for name in ENCODERS]
        assert all(cosines(a, b).min() > LEAST_COSINE for a, b in pairs)
        errors[dtype] = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    assert errors["float32"] == 0 < errors["float16"] < errors["bfloat16"] / 4 < errors["int8"]


def test_values_that_a_precision_does_not_hold_are_seen():
    exact = ramps()
    exact.t5[0, 1, 7] = 1e6
    assert [StoredText.of(exact, dtype).is_finite for dtype in DTYPES] == [True, False, True, True]
    exact.t5[0, 1, 7] = float("nan")
    assert not any(StoredText.of(exact, dtype).is_finite for dtype in DTYPES)


def released_row(clip: int, t5: int, dtype: str) -> StoredText:
    """One caption of `clip` and `t5` real tokens, as the released encoders' widths have it."""
    generator = torch.Generator().manual_seed(clip * 100 + t5)
    wide = {"clip_l": clip, "clip_g": clip, "t5": t5}
    sequences = [torch.randn(1, tokens, RELEASED_WIDTHS[name], generator=generator) for name, tokens in wide.items()]
    pooled = [torch.randn(1, RELEASED_WIDTHS[name], generator=generator) for name in ("clip_l", "clip_g_pooled")]
    return StoredText.of(TextFeatures(*sequences, *pooled, torch.tensor([[clip, clip, t5]])), dtype)


def in_tar(data: bytes) -> int:
    """With its header, to whole blocks."""
    return TAR_BLOCK * (1 + math.ceil(len(data) / TAR_BLOCK))


@pytest.mark.parametrize(("dtype", "whole", "trimmed", "most"), [
    ("float32", 2.00, 0.88, 1.0), ("float16", 1.04, 0.47, 0.5), ("bfloat16", 1.04, 0.47, 0.5), ("int8", 0.56, 0.28, 0.28),
])  # fmt: skip
def test_captions_of_32_tokens_take_this_share_of_the_plain_layout(dtype, whole, trimmed, most):
    """Bytes in the tars, latents in float32 as the recipes have them, against text and latent in 16 bits at full length."""
    assert PLAIN_SAMPLE_BYTES == 983_040
    latent = in_tar(latent_bytes(torch.zeros(16, 32, 32)))
    lengths = np.arange(8, 57)
    assert lengths.mean() == 32
    pairs = zip(
        lengths.tolist(), np.random.default_rng(0).permutation(lengths).tolist(), strict=True
    )  # CLIP's and T5's
    of_trimmed = [in_tar(released_row(clip, t5, dtype).to_bytes("trimmed")) for clip, t5 in pairs]
    share = (latent + np.mean(of_trimmed)) / PLAIN_SAMPLE_BYTES
    assert share < most and share == pytest.approx(trimmed, abs=0.006)
    of_whole = in_tar(released_row(77, 77, dtype).to_bytes("reference"))
    assert (latent + of_whole) / PLAIN_SAMPLE_BYTES == pytest.approx(whole, abs=0.006)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_counts_the_bytes_of_the_precision(dtype):
    recipe = load_recipe("sd3-8b", [f"encode.text_dtype={dtype}"])
    row = released_row(77, 77, dtype)
    assert text_bytes(recipe) == row.nbytes - row.tensors["lengths"].nbytes


def test_validation_loss_is_the_same_within_its_noise_in_any_precision(towers_folder):
    """A model that is trained on 32-bit features of real towers, asked with the same draws and features of fewer bits.

    The noise of a validation loss: how far it is from that of other draws.
    """
    torch.manual_seed(0)
    pictures, captions = drawings(72)
    exact = load_text_encoders(towers_folder, TOWERS_TEXT).encode(captions)
    x0 = latents_of(pictures)
    config = MMDiTConfig.from_depth(2, context_dim=64, pooled_dim=80, position_base=4, position_side=4, position_max=8)
    model, ids = make_model(config), np.arange(72)
    context, pooled = join_features(exact, context_dim=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        rows, t = torch.randint(48, (24,)), torch.rand(24)
        noise = torch.randn_like(x0[rows])
        predicted = model(interpolate(x0[rows], noise, t), t, context[rows], pooled[rows])
        loss = (predicted - velocity_target(x0[rows], noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def held_out(features: TextFeatures, seed: int = 0) -> float:
        condition = [part[48:] for part in join_features(features, context_dim=64)]
        losses = level_losses(lambda z, t: model(z, t, *condition), x0[48:], ids[48:], seed)
        return validation_loss(losses).value

    loss = held_out(exact)
    noise = float(np.std([held_out(exact, seed) for seed in range(1, 4)]))
    changes = {dtype: abs(held_out(StoredText.of(exact, dtype).features()) - loss) for dtype in DTYPES}
    nothing = TextFeatures(**{name: 0 * getattr(exact, name) for name in TextFeatures.__dataclass_fields__})
    assert changes["float32"] == 0 and max(changes.values()) < noise / 100
    assert held_out(nothing) - loss > 2 * noise  # the model does look at its text


def latents_of(pictures: list[np.ndarray]) -> torch.Tensor:
    """(B, 16, 8, 8): means of small squares of a picture's colours, another mixture in every channel."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 3, generator=generator)
    small = [
        torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1, 8)
        for picture in pictures
    ]
    return torch.einsum("oc,bchw->bohw", mix, torch.stack(small))
