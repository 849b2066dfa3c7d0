"""Fréchet distance between two sets of features, each taken as a Gaussian.

It is the FID of Heusel et al. 2017, computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sd3core.metrics.score import LeftOut, Score, too_few

PICTURES_A_DIMENSION = 10  # with fewer, the distance is mostly its own bias, and ranks nothing
GROUPS = 20  # of the jackknife
CONFIDENCE = 0.95
REAL_SETS = 8  # of real pictures that are compared with the other real ones, at most


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of `count` features."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        features = np.asarray(features, dtype=np.float64)  # (n, D)
        return cls(len(features), features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances.

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and has no
    negative ones: no matrix root of a general product, no jitter, exact for singular covariances.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ b.covariance @ root_a).clip(min=0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


def frechet_score(features: np.ndarray, reference: np.ndarray) -> Score | LeftOut:
    """The distance between generated (n, D) and reference (m, D) features.

    Left out unless n and m exceed D: with fewer the covariance has directions that were never seen. The paper has
    1,000 for 768. The distance falls as n grows, so compare it at equal n only.
    """
    for sample, what in ((features, "generated images"), (reference, "held-out images")):
        if len(sample) <= features.shape[1]:
            dimensions = f" (the judge's features have {features.shape[1]} dimensions)"
            return too_few("FID", len(sample), features.shape[1] + 1, what + dimensions)
    others = Moments.of(reference)
    value = frechet_distance(Moments.of(features), others)
    beside: dict[str, Any] = {
        "interval": list(jackknife_interval(features, others, value)),
        "dimensions": features.shape[1],
        "ranks_nothing": ranks_nothing(len(features), features.shape[1]),
    }
    real = real_against_real(reference, len(features))
    if real is not None:
        beside["real"] = real
    return Score(value, len(features), beside)


def ranks_nothing(count: int, dimensions: int) -> bool:
    return count < PICTURES_A_DIMENSION * dimensions


def jackknife_interval(features: np.ndarray, reference: Moments, value: float) -> tuple[float, float]:
    """Where the distance of other draws of as many pictures would lie, at 95 %, the reference being as it is.

    A jackknife that leaves out one of up to 20 groups in turn: variance (G - 1) / G * sum (d_g - mean d)^2, Student's t with
    G - 1 degrees of freedom. It covers the expected distance *at this count*, not that of endless pictures: the distance
    of n pictures is too large by about 1 / n of something, which `real_against_real` shows at the same n. A bootstrap would
    not do: pictures that are drawn twice make every resampled distance larger still.
    """
    groups = min(GROUPS, len(features))
    left_out = np.array(
        [
            frechet_distance(Moments.of(np.delete(features, np.s_[group::groups], axis=0)), reference)
            for group in range(groups)
        ]
    )
    error = np.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum())
    from scipy.special import stdtrit  # here: whoever only plans an evaluation does not load it

    half = float(stdtrit(groups - 1, (1 + CONFIDENCE) / 2) * error)
    return max(value - half, 0.0), value + half


def real_against_real(reference: np.ndarray, count: int) -> dict[str, Any] | None:
    """What as many real pictures score against the others: the mean over sets that share no picture, and its spread.

    None where fewer than two such sets are held out: the others would be fewer than the set.
    """
    sets = min(REAL_SETS, len(reference) // count)
    if sets < 2:
        return None
    found = []
    for number in range(sets):
        chosen = np.s_[number * count : (number + 1) * count]
        others = Moments.of(np.delete(reference, chosen, axis=0))
        found.append(frechet_distance(Moments.of(reference[chosen]), others))
    return {"value": float(np.mean(found)), "spread": float(np.std(found, ddof=1)), "sets": sets, "count": count}
