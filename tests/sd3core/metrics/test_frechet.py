import numpy as np
import pytest
from scipy.linalg import sqrtm

from sd3core.metrics import LeftOut, Score
from sd3core.metrics.frechet import Moments, frechet_distance, frechet_score, jackknife_interval, real_against_real


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


def test_the_interval_covers_the_expected_distance_at_that_count():
    """Gaussians, 48 pictures in 3 dimensions: 95 % is asked; 400 draws of this measure 0.95 to 0.96, 80 may be off by 0.05."""
    generator = np.random.default_rng(0)
    reference = Moments.of(generator.normal(size=(400, 3)))
    found = []
    for _ in range(80):
        drawn = generator.normal(size=(48, 3)) * [0.6, 1.0, 1.6] + 0.3
        value = frechet_distance(Moments.of(drawn), reference)
        found.append((value, *jackknife_interval(drawn, reference, value)))
    expected = np.mean([value for value, _, _ in found])
    covered = np.mean([low <= expected <= high for _, low, high in found])
    assert 0.88 <= covered <= 1.0
    widths = [high - low for _, low, high in found]
    assert 0.6 < np.mean(widths) / (2 * 2.09 * np.std([value for value, _, _ in found])) < 1.6


def test_real_pictures_against_real_ones_show_the_bias_at_the_same_count():
    """Both sides are one Gaussian, so all that is measured is the bias, which falls with the count."""
    reference = np.random.default_rng(1).normal(size=(600, 6))
    few, many = real_against_real(reference, 12), real_against_real(reference, 150)
    assert few["value"] > 4 * many["value"] > 0 and (few["sets"], many["sets"]) == (8, 4)
    assert real_against_real(reference, 301) is None


def test_few_pictures_for_the_dimensions_rank_nothing():
    generator = np.random.default_rng(2)
    reference = generator.normal(size=(200, 4))
    few, enough = (frechet_score(generator.normal(size=(count, 4)), reference) for count in (39, 40))
    assert few.beside["ranks_nothing"] and not enough.beside["ranks_nothing"]
    low, high = few.beside["interval"]
    assert low <= few.value <= high and few.beside["dimensions"] == 4 and few.beside["real"]["count"] == 39
