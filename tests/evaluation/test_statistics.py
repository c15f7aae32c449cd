"""Mean and covariance in parts against NumPy's in one; files, ours and others'."""

import numpy as np
import pytest

from t2i_jax.evaluation import statistics
from t2i_jax.evaluation.statistics import Statistics

X = np.random.default_rng(0).normal(size=(101, 7)).astype("f4") @ np.diag([1, 2, 3, 1, 0, 9, 1e-3])


def same(a, b, tolerance=1e-12):
    assert a.n == b.n
    scale = np.sqrt(np.diag(b.covariance)) + 1e-9
    assert np.abs((a.mean - b.mean) / scale).max() < tolerance
    assert np.abs((a.covariance - b.covariance) / np.outer(scale, scale)).max() < tolerance


def test_they_are_numpys():
    one = Statistics.of(X)
    assert one.n == 101 and one.mean.dtype == one.covariance.dtype == np.float64
    same(one, Statistics(X.mean(0), np.cov(X, rowvar=False), 101))


@pytest.mark.parametrize("cuts", [[1], [50], [1, 2, 3, 4], [20, 21, 99, 100], list(range(1, 101))])
def test_any_parts_are_the_whole(cuts, monkeypatch):
    parts = np.split(X, cuts)
    same(Statistics.of_batches(iter(parts)), Statistics.of(X))
    halves = Statistics.of_batches(parts[::2]), Statistics.of_batches(parts[1::2])
    same(halves[1].merge(halves[0]), Statistics.of(X))
    same(Statistics.of(X).without(halves[0]), halves[1], 1e-9)
    monkeypatch.setattr(statistics, "_ROWS", 8)
    same(Statistics.of(X), Statistics.of_batches([X]))


def test_nothing_cancels_far_from_zero():
    """Sums of squares of these would leave no digit of the variance."""
    far = np.float64(X[:, :4]) + 1e9
    expected = np.cov(far - 1e9, rowvar=False)
    for found in (Statistics.of(far), Statistics.of_batches(np.split(far, range(5, 101, 5)))):
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-6, atol=1e-6)


def test_features_that_are_not_refused():
    broken = X.copy()
    broken[3, 2] = np.nan
    for features, text in ((broken, "not finite"), (X[:0], "one or more"), (X[0], "one or more")):
        with pytest.raises(ValueError, match=text):
            Statistics.of(features)
    with pytest.raises(ValueError, match="widths 7 and 3"):
        Statistics.of(X).merge(Statistics.of(X[:, :3]))
    with pytest.raises(ValueError, match="cannot be taken out"):
        Statistics.of(X).without(Statistics.of(X))


def test_files(tmp_path):
    one = Statistics.of(X)
    one.save(tmp_path / "ours.npz")
    again = Statistics.load(tmp_path / "ours.npz")
    assert again.n == 101
    np.testing.assert_array_equal(again.mean, one.mean)
    np.testing.assert_array_equal(again.covariance, one.covariance)
    np.savez(tmp_path / "theirs.npz", mu=X.mean(0), sigma=np.cov(X, rowvar=False))
    theirs = Statistics.load(tmp_path / "theirs.npz")
    assert theirs.n is None
    np.testing.assert_allclose(theirs.covariance, one.covariance, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="without the number n"):
        theirs.merge(one)
    theirs.save(tmp_path / "again.npz")
    assert Statistics.load(tmp_path / "again.npz").n is None


def test_other_files_are_refused(tmp_path):
    def refused(text, **arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=text) as error:
            Statistics.load(tmp_path / "a.npz")
        assert str(tmp_path / "a.npz") in str(error.value)

    refused(r"has no mu and no sigma; it holds \['feats'\]", feats=X)
    refused("no mean and covariance", mu=np.zeros(3), sigma=np.eye(4))
    refused("not finite", mu=np.full(3, np.inf), sigma=np.eye(3))
    refused("allow_pickle=False", mu=np.array([{}], object), sigma=np.eye(1))
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="of numbers"):
        Statistics.load(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(ValueError, match="of numbers"):
        Statistics.load(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "b.npz")
