"""Whether a validation loss turns up: synthetic curves, of which it is known."""

from __future__ import annotations

import numpy as np
import pytest

from sd3core.metrics.rising_loss import find_rise, rise_line

CURVES = 2_000  # of each kind
IMAGES, OF_IMAGES, OWN_NOISE = (
    128,
    0.25,
    0.05,
)  # as parts of a loss of one: how images differ, how checkpoints do on an image


def curve(rng: np.random.Generator, means: np.ndarray, wobble: float = 0.0, images: int = IMAGES) -> np.ndarray:
    """means (k,) -> (k, images). `wobble`: by how much checkpoints differ on all images at once, besides."""
    of_images = 1 + OF_IMAGES * rng.standard_normal(images)
    of_checkpoints = means + wobble * rng.standard_normal(len(means))
    return of_checkpoints[:, None] * (of_images + OWN_NOISE * rng.standard_normal((len(means), images)))


def found(means: np.ndarray, wobble: float = 0.0, images: int = IMAGES) -> float:
    """The share of such curves that are said to rise."""
    rng = np.random.default_rng(0)
    samples = range(1, len(means) + 1)
    return float(np.mean([find_rise(samples, curve(rng, means, wobble, images)) is not None for _ in range(CURVES)]))


@pytest.mark.parametrize("checkpoints", [2, 5, 20])
@pytest.mark.parametrize("images", [8, IMAGES])
def test_noise_alone_is_no_rise(checkpoints, images):
    """Images and their noise alone: fewer than one false alarm in a hundred, also of few images."""
    assert found(np.ones(checkpoints), images=images) < 0.01


@pytest.mark.parametrize("checkpoints", [2, 5, 20])
def test_checkpoints_that_differ_by_a_hundredth_are_no_rise(checkpoints):
    """All images share what such checkpoints differ by, so no interval over images covers it."""
    assert found(np.ones(checkpoints), wobble=0.01) < 0.01


def test_a_loss_that_falls_or_has_come_to_rest_is_no_rise():
    assert found(1 + 0.5 ** np.arange(1, 7), wobble=0.005) == 0
    assert found(1 + 0.5 ** np.arange(1, 20), wobble=0.01) < 0.01


def test_a_curve_that_goes_up_and_down_is_no_rise():
    zigzag = np.array([1.0, 1.1, 1.0, 1.1, 1.0, 1.1])
    assert find_rise(range(6), curve(np.random.default_rng(0), zigzag)) is None


@pytest.mark.parametrize("means", [(1.0, 1.1), (1.4, 1.0, 1.05, 1.1), (2.0, 1.18, 1.6, 2.58)])
def test_a_true_rise_is_found(means):
    assert found(np.array(means), wobble=0.005) > 0.99


def test_a_rise_names_where_it_began_and_its_interval_holds_the_true_difference():
    """At 99 % and with the bound for all pairs, hardly any interval may miss."""
    rng, held, means = np.random.default_rng(1), 0, np.array([1.6, 1.2, 1.3, 1.5])
    for _ in range(500):
        rise = find_rise((10, 20, 30, 40), curve(rng, means))
        assert (rise.since, rise.samples, rise.count) == (20, 40, IMAGES)
        assert rise.low < rise.last - rise.lowest < rise.high
        held += rise.low < 0.3 < rise.high
    assert held >= 0.97 * 500


def test_pairing_finds_what_an_interval_over_other_images_would_not():
    """A rise of 7 %, where images differ by a quarter, on 36 of them."""
    rng, paired, shuffled = np.random.default_rng(0), 0, 0
    for _ in range(CURVES):
        losses = curve(rng, np.array([1.0, 1.07]), images=36)
        paired += find_rise((1, 2), losses) is not None
        shuffled += find_rise((1, 2), np.stack([losses[0], rng.permutation(losses[1])])) is not None
    assert paired > 0.6 * CURVES and shuffled < 0.1 * CURVES


@pytest.mark.parametrize("shape", [(1, 9), (3, 1), (0, 9)])
def test_too_little_says_nothing(shape):
    assert find_rise(range(shape[0]), np.ones(shape)) is None


def test_the_line_says_since_when_and_what_it_means():
    samples, losses = (57_600, 115_200), np.array([[1.17, 1.19], [2.57, 2.59]])
    rise = find_rise(samples, np.repeat(losses, 18, axis=1))
    line = rise_line("finetune.0", rise, 457)
    assert line.startswith(
        "finetune.0: validation loss rises since the checkpoint of 57,600 samples (1.18 -> 2.58 after 115,200; by 1.40 to 1.40 on"
        " the same 36 held-out images): the model learns its 457 images by heart (252 epochs); export.checkpoint=best:"
    )
    assert "not by learning by heart: lower the learning rate" in rise_line("pretrain", rise, 100_000)
    assert "on images that it does not see; export.checkpoint=best:" in rise_line("pretrain", rise, None)
