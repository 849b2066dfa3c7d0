"""Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sd3core.metrics.score import LeftOut, Score, too_few


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
    return Score(frechet_distance(Moments.of(features), Moments.of(reference)), len(features))
