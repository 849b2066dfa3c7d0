"""Says whether a validation loss has turned up; noise does not set it off.

Every checkpoint of a phase is measured on the same images, levels and noise, so two of them are compared image by image: what
makes one image harder than another is in both and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sd3core.words import counted

CURVE_CONFIDENCE = 0.99  # of all comparisons of a curve together
LEAST_SHARE = 0.03  # of the lowest loss: by less, neighbouring checkpoints differ that are as good as each other
FALL_SHARE = 0.5  # of the rise: a curve that falls again by so much goes up and down
HEART_EPOCHS = 3.0  # fewer do not teach a model its images by heart


@dataclass(frozen=True)
class Rise:
    """The loss at its lowest and at the end of a curve, and the interval of the difference over images."""

    since: int  # samples at the lowest
    lowest: float
    samples: int  # at the end
    last: float
    low: float
    high: float
    count: int  # images


def find_rise(samples: Sequence[int], losses: np.ndarray) -> Rise | None:
    """The rise from the lowest mean loss to the last; None where there is none that counts.

    samples (k,), ascending; losses (k, n): every checkpoint's loss of the same n images in the same order. A rise counts where
    the interval of the mean difference, image by image, by Student's t at 99 % for all k (k - 1) / 2 pairs of checkpoints
    together (Bonferroni: the lowest was chosen by looking), lies above 3 % of the lowest loss, and no fall since the lowest, from
    one checkpoint to the next, is half as large. On curves without a rise fewer than one in a hundred is reported
    (tests/sd3core/metrics/test_rising_loss.py).
    """
    checkpoints, images = losses.shape
    if checkpoints < 2 or images < 2:
        return None
    means = losses.mean(axis=1)
    lowest = int(means.argmin())
    if lowest == checkpoints - 1:
        return None
    from scipy.special import stdtrit  # here: whoever only plans an evaluation does not load it

    differences = losses[-1] - losses[lowest]  # (n,)
    pairs = checkpoints * (checkpoints - 1) / 2
    quantile = float(stdtrit(images - 1, 1 - (1 - CURVE_CONFIDENCE) / 2 / pairs))
    half = quantile * float(differences.std(ddof=1)) / math.sqrt(images)
    rise = float(differences.mean())
    largest_fall = max(0.0, *(-np.diff(means[lowest:])).tolist())
    if rise - half <= LEAST_SHARE * means[lowest] or largest_fall >= FALL_SHARE * rise:
        return None
    ends = float(means[lowest]), samples[-1], float(means[-1])
    return Rise(samples[lowest], *ends, rise - half, rise + half, images)


def rise_line(phase: str, rise: Rise, images: int | None) -> str:
    """What a rise is, since when, what it means and what mends it. `images`: that the phase trains on, where that is known."""
    epochs = rise.samples / images if images else 0.0
    if not images:
        means = "training gets worse on images that it does not see"
    elif epochs >= HEART_EPOCHS:
        means = f"the model learns its {counted(images, 'image')} by heart ({epochs:,.0f} epochs)"
    else:
        means = f"training gets worse, and after {epochs:.1f} epochs not by learning by heart: lower the learning rate"
    return (
        f"{phase}: validation loss rises since the checkpoint of {rise.since:,} samples ({rise.lowest:.2f} -> {rise.last:.2f} after"
        f" {rise.samples:,}; by {rise.low:.2f} to {rise.high:.2f} on the same {counted(rise.count, 'held-out image')}): {means};"
        f" export.checkpoint=best:validation_loss and `sd3 sample --best` take that checkpoint, {phase}.max_epochs ends sooner"
    )
