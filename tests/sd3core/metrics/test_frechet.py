import numpy as np
import pytest
from scipy.linalg import sqrtm

from sd3core.metrics import LeftOut, Score
from sd3core.metrics.frechet import Moments, frechet_distance, frechet_score


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def test_closed_form_of_diagonal_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    m1, m2 = rng.normal(size=(2, 7))
    s1, s2 = rng.uniform(0.1, 3, size=(2, 7))
    distance = frechet_distance(Moments(9, m1, np.diag(s1**2)), Moments(9, m2, np.diag(s2**2)))
    assert distance == pytest.approx(np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2), rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_agrees_with_scipy_root_of_the_product(rank):
    rng = np.random.default_rng(1)
    a = Moments(9, rng.normal(size=12), random_covariance(rng, 12))
    b = Moments(9, rng.normal(size=12), random_covariance(rng, 12, rank))
    product = sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * product.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_agrees_with_torchmetrics():
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):  # the first pixels as features
        num_features = 6

        def forward(self, images):
            return images.flatten(1)[:, :6].double()

    images = torch.randint(0, 256, (2, 40, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4))
    metric.set_dtype(torch.float64)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    features = images.flatten(2)[..., :6].numpy()
    assert frechet_score(features[1], features[0]).value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_a_sample_against_itself_is_zero_and_too_few_are_left_out():
    features = np.random.default_rng(2).normal(size=(60, 8)).astype(np.float32)
    score = frechet_score(features, features)
    assert isinstance(score, Score) and score.count == 60 and score.value == pytest.approx(0, abs=1e-9)
    for few in (frechet_score(features[:8], features), frechet_score(features, features[:8])):
        assert isinstance(few, LeftOut) and "at least 9" in few.reason and "8 dimensions" in few.reason
    assert isinstance(frechet_score(features[:9], features), Score)
