import numpy as np
import pytest

from sd3core.randomness import normal, uniform, uniforms

IDS = np.arange(64) * 7919 + 2**60


def test_golden_values():
    """Checkpoints resume on these numbers: if a library changes them, pin it or write the draws out by hand."""
    got_uniform = uniforms(0, 3, [5, 2**62], "timestep", 3)
    got_normal = normal(0, 3, [5, 2**62], "noise", (2, 2))
    assert got_uniform.tolist() == [
        [0.13176680263699947, 0.8480827657127592, 0.5060260044403199],
        [0.8280881402406881, 0.5769590747445953, 0.5639788258298569],
    ]
    expected = [
        [[-0.03773607686161995, -0.375703364610672], [1.1606403589248657, 0.09148886054754257]],
        [[1.9091209173202515, 1.550387978553772], [-0.7445734143257141, -0.22850839793682098]],
    ]
    np.testing.assert_allclose(got_normal, expected, atol=1e-6)


def test_shapes_and_types():
    assert uniform(0, 0, IDS, "t").shape == (64,) and uniform(0, 0, IDS, "t").dtype == np.float64
    assert uniforms(0, 0, IDS, "t", 5).shape == (64, 5)
    assert normal(0, 0, IDS, "n", (4, 3, 2)).shape == (64, 4, 3, 2) and normal(0, 0, IDS, "n", (4,)).dtype == np.float32
    assert normal(0, 0, [], "n", (4, 2)).shape == (0, 4, 2)
    assert np.array_equal(uniforms(0, 0, IDS, "t", 5)[:, 0], uniform(0, 0, IDS, "t"))


def test_a_draw_depends_on_its_own_sample_only():
    together = normal(1, 2, IDS, "noise", (3, 5))
    order = np.random.default_rng(0).permutation(64)
    assert np.array_equal(normal(1, 2, IDS[order], "noise", (3, 5)), together[order])
    assert np.array_equal(normal(1, 2, IDS[10:11], "noise", (3, 5))[0], together[10])
    mixed = normal(1, np.where(np.arange(64) % 2, 2, 9), IDS, "noise", (3, 5))
    assert np.array_equal(mixed[1::2], together[1::2]) and not np.isclose(mixed[::2], together[::2]).any()


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"epoch": 4}, {"purpose": "dropout"}, {"sample_ids": IDS + 1}, {"seed": 3, "epoch": 1}]
)
def test_seeds_epochs_samples_and_purposes_are_independent(other):
    arguments = {"seed": 1, "epoch": 3, "sample_ids": IDS, "purpose": "noise"}
    a = normal(**arguments, shape=(400,)).ravel()
    b = normal(**(arguments | other), shape=(400,)).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)
    assert len(np.intersect1d(a, b)) < 0.01 * a.size


def test_neighbouring_samples_do_not_overlap():
    draws = uniforms(0, 0, np.arange(64), "t", 200)
    assert len(np.unique(draws)) == draws.size
    assert np.abs(np.corrcoef(draws) - np.eye(64)).max() < 0.4


def test_moments():
    u, n = uniforms(0, 0, IDS, "t", 2000), normal(0, 0, IDS, "n", (2000,))
    assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002 and u.min() >= 0 and u.max() < 1
    assert abs(n.mean()) < 0.015 and abs(n.std() - 1) < 0.01 and abs((n**4).mean() - 3) < 0.15
