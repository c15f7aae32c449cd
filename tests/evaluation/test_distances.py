"""Distances against closed forms, direct sums and SciPy; intervals against repetitions."""

import itertools

import numpy as np
import pytest
from scipy import stats
import scipy.linalg

from t2i_jax.evaluation import distances
from t2i_jax.evaluation.distances import clip_score, cmmd, fid, frechet, kid
from t2i_jax.evaluation.statistics import Statistics


def features(n, width, seed, shift=0.0):
    """Correlated, with deviations over two decades."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(width, width)) * np.geomspace(0.1, 1, width)
    return (rng.normal(size=(n, width)) @ mix + shift).astype("f4")


def gaussian(mean, covariance):
    return Statistics(np.float64(mean), np.float64(covariance), None)


@pytest.mark.parametrize("n", [400, 20])
def test_frechet_is_scipys(n):
    """Twenty features of width 32 have singular covariances."""
    x, y = features(n, 32, 0), features(n, 32, 1, shift=0.1)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    d = np.float64(x).mean(0) - np.float64(y).mean(0)
    root = scipy.linalg.sqrtm(a @ b) if n > 32 else None
    overlap = np.trace(root).real if n > 32 else np.sqrt(np.linalg.eigvals(a @ b + 0j)).real.sum()
    expected = d @ d + np.trace(a + b) - 2 * overlap
    actual = frechet(Statistics.of(x), Statistics.of(y))
    assert abs(actual - expected) < 1e-6 * expected
    assert abs(frechet(Statistics.of(y), Statistics.of(x)) - actual) < 1e-6 * expected


def test_frechet_of_gaussians_with_a_closed_form():
    # One dimension: the means and the deviations.
    assert frechet(gaussian([1], [[4]]), gaussian([3], [[25]])) == pytest.approx(4 + 9, rel=1e-12)
    # Commuting: the deviations along the common axes.
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    s, t = np.array([3, 2, 1, 0.5, 0]), np.array([1, 2, 0, 4, 0])
    a, b = (axes * s**2) @ axes.T, (axes * t**2) @ axes.T
    apart = frechet(gaussian(np.zeros(5), a), gaussian(np.full(5, 0.2), b))
    assert apart == pytest.approx(5 * 0.04 + ((s - t) ** 2).sum(), rel=1e-7)
    # Two by two: tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2).
    a, b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a + b) - 2 * overlap
    assert frechet(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-12)
    # Points.
    zero = np.zeros((2, 2))
    assert frechet(gaussian([0, 3], zero), gaussian([4, 0], zero)) == pytest.approx(25)


def test_frechet_of_a_set_with_itself_is_zero():
    for n in (400, 20):
        one = Statistics.of(features(n, 32, 0))
        assert 0 <= frechet(one, one) < 1e-6 * np.trace(one.covariance)


def test_fid_is_the_distance_and_its_interval_holds_the_spread():
    reference = Statistics.of(features(5000, 3, 0))
    found = [fid(features(300, 3, seed, shift=0.3), reference) for seed in range(1, 161)]
    x = features(300, 3, 1, shift=0.3)
    assert found[0].value == frechet(Statistics.of(x), reference) and found[0].n == 300
    reach = np.array([(one.interval[1] - one.interval[0]) / 2 for one in found])
    deviation = reach.mean() / stats.t.ppf(0.975, 19)
    assert deviation == pytest.approx(np.std([one.value for one in found]), rel=0.2)
    centre = np.mean([one.value for one in found])
    holds = np.mean([one.interval[0] <= centre <= one.interval[1] for one in found])
    assert 0.88 < holds < 0.99


def test_fid_leaves_out_every_group_once():
    reference = Statistics.of(features(500, 4, 0))
    x = features(41, 4, 1)
    left = [frechet(Statistics.of(np.delete(x, np.s_[i::5], axis=0)), reference) for i in range(5)]
    deviation = np.sqrt(4 / 5 * np.sum((left - np.mean(left)) ** 2))
    found = fid(x, reference, groups=5)
    reach = stats.t.ppf(0.975, 4) * deviation
    assert found.interval[1] - found.value == pytest.approx(reach, rel=1e-6)


def direct_kid(x, y):
    x, y = np.float64(x), np.float64(y)

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    same = sum(k(z[i], z[j]) for z in (x, y) for i, j in itertools.permutations(range(n), 2))
    return same / (n * (n - 1)) - 2 * sum(k(a, b) for a in x for b in y) / n**2


def test_kid_is_the_sum_over_pairs():
    x, y = features(9, 5, 0), features(9, 5, 1, shift=0.5)
    whole = kid(x, y, subsets=3, subset_size=9)  # a subset of all: in another order
    assert whole.mean == pytest.approx(direct_kid(x, y), rel=1e-12)
    assert whole.deviation < 1e-12 and whole[2:] == (3, 9)


def test_kid_is_unbiased():
    """For width 1, E k(x, y) = 1 + 3 m_1 + 3 m_2 + m_3 in products of the moments of x and y."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20_000, 1)), rng.normal(0.5, 0.7, size=(20_000, 1))
    moments = np.array([[(z**k).mean() for k in (1, 2, 3)] for z in (x, y)])
    expected = np.array([3, 3, 1]) @ (moments[0] - moments[1]) ** 2
    found = kid(x, y, subsets=4000, subset_size=5)
    assert abs(found.mean - expected) < 4 * found.deviation / np.sqrt(4000)
    null = kid(x[:10_000], x[10_000:], subsets=4000, subset_size=5)
    assert abs(null.mean) < 4 * null.deviation / np.sqrt(4000)
    assert kid(x, y, subsets=2, subset_size=5) == kid(x, y, subsets=2, subset_size=5)
    assert kid(x, y, subsets=2, subset_size=5) != kid(x, y, subsets=2, subset_size=5, seed=1)


def direct_cmmd(x, y):
    def mean(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_the_sum_over_pairs_on_the_sphere(monkeypatch):
    monkeypatch.setattr(distances, "_ROWS", 4)
    x, y = features(11, 6, 0), features(14, 6, 1, shift=1.0)
    u, v = (np.float64(z) / np.linalg.norm(np.float64(z), axis=1)[:, None] for z in (x, y))
    found = cmmd(x, 2 * y)  # lengths do not count
    assert found.value == pytest.approx(direct_cmmd(u, v), rel=1e-9) and found.n == 11
    left = np.array([direct_cmmd(np.delete(u, i, axis=0), v) for i in range(11)])
    deviation = np.sqrt(10 / 11 * np.sum((left - left.mean()) ** 2))
    reach = stats.t.ppf(0.975, 10) * deviation
    assert found.interval[1] - found.value == pytest.approx(reach, rel=1e-6)
    assert cmmd(x, x).value == pytest.approx(0, abs=1e-12)


def test_clip_score():
    """Cosines of 1, 0.6, -1 and 0, whatever the lengths."""
    pictures = np.array([[2, 0], [3, 4], [0, 1], [0, 5]], "f4")
    prompts = np.array([[7, 0], [1, 0], [0, -1], [2, 0]], "f4")
    found = clip_score(pictures, prompts)
    assert found.value == pytest.approx(40.0, rel=1e-6) and found.n == 4
    reach = stats.t.ppf(0.975, 3) * stats.sem([100, 60, 0, 0])
    np.testing.assert_allclose(found.interval, [40 - reach, 40 + reach], rtol=1e-6)


def test_what_cannot_be_compared_is_refused():
    x, wide = features(9, 5, 0), features(9, 6, 0)
    broken = x.copy()
    broken[2, 2] = np.inf
    one = Statistics.of(x)
    refused = [
        (frechet, (one, Statistics.of(wide)), "widths 5 and 6"),
        (frechet, (one, Statistics.of(x[:1])), "no covariance"),
        (fid, (x, one), "20 groups of 9"),
        (kid, (x, x), "subset_size = 1000, but the smaller set has 9"),
        (kid, (x, wide), "other widths"),
        (cmmd, (x, broken), "not finite"),
        (cmmd, (0 * x, x), "are zero"),
        (cmmd, (x[:1], x), "two or more"),
        (clip_score, (x, x[:4]), "9 pictures and 4 prompts"),
    ]
    for function, arguments, text in refused:
        with pytest.raises(ValueError, match=text):
            function(*arguments)
