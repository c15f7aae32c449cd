"""Mean and covariance of features, in float64, whatever the parts in which they come.

A set of n features with mean m and scatter S = sum_i (x_i - m) (x_i - m)^T may come in parts. For
two of them, with d = m_b - m_a (Chan, Golub and LeVeque, 1979),

    n = n_a + n_b,   m = m_a + (n_b / n) d,   S = S_a + S_b + (n_a n_b / n) d d^T,

where every term is a sum of squares, so that nothing cancels. Solved for the first part, it takes
the second out again. The covariance is S / (n - 1), as in the published FIDs.
"""

from collections.abc import Iterable
import functools
import io
import os
from typing import NamedTuple
import zipfile

from etils import epath
import numpy as np

_ROWS = 4096  # features that are held in float64 at once


class Statistics(NamedTuple):
    """Of a set of features of width D. What makes another leaves this one as it is."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64; zeros where n = 1
    n: int | None  # features; None: not known, of a file of others, to compare with

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Statistics":
        """Raises ValueError where there is none, or one that is not finite."""
        if np.ndim(features_ND) != 2 or not np.size(features_ND):
            raise ValueError(f"Features are (n, D), one or more; got {np.shape(features_ND)}.")
        starts = range(0, len(features_ND), _ROWS)
        return cls.of_batches(features_ND[i : i + _ROWS] for i in starts)

    @classmethod
    def of_batches(cls, batches: Iterable[np.ndarray]) -> "Statistics":
        """Of all features (n, D) of one or several batches, none of which is kept."""
        return functools.reduce(cls.merge, map(_of_rows, batches))

    def merge(self, other: "Statistics") -> "Statistics":
        """Of both sets together."""
        return self._combined(other, 1)

    def without(self, other: "Statistics") -> "Statistics":
        """Of what is left without a part of the set. Raises ValueError where nothing is."""
        return self._combined(other, -1)

    def _combined(self, other: "Statistics", sign: int) -> "Statistics":
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Features of widths {len(self.mean)} and {len(other.mean)}.")
        if self.n is None or other.n is None:
            raise ValueError("Statistics of a file without the number n stand alone.")
        n = self.n + sign * other.n
        if n < 1:
            raise ValueError(f"Of {self.n} features, {other.n} cannot be taken out.")
        d = other.mean - self.mean
        scatter = (self.n - 1) * self.covariance + sign * (other.n - 1) * other.covariance
        scatter += sign * (self.n * other.n / n) * np.outer(d, d)
        return Statistics(self.mean + sign * (other.n / n) * d, scatter / max(n - 1, 1), n)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz file of mu, sigma and n, which pytorch-fid and clean-fid read, too."""
        arrays = {"mu": self.mean, "sigma": self.covariance}
        arrays |= {} if self.n is None else {"n": np.int64(self.n)}
        file = io.BytesIO()
        np.savez(file, **arrays)
        epath.Path(path).write_bytes(file.getvalue())

    @classmethod
    def load(cls, path: epath.PathLike) -> "Statistics":
        """Reads what `save` wrote, or the statistics of pytorch-fid or clean-fid, mu and sigma.

        Raises FileNotFoundError where there is no file, ValueError where it holds something else.
        """
        found = read_arrays(path)
        where = os.fspath(path)
        if missing := [key for key in ("mu", "sigma") if key not in found]:
            raise ValueError(f"{where} has no {' and no '.join(missing)}; it holds {list(found)}.")
        mean, covariance = (np.float64(found[key]) for key in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(
                f"{where}: mu {mean.shape} and sigma {covariance.shape} are no mean and covariance."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{where} has numbers that are not finite.")
        return cls(mean, covariance, int(found["n"]) if "n" in found else None)


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Nothing is unpickled. Errors as of `Statistics.load`."""
    data = epath.Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return dict(found)
    except (ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)} is no .npz file of numbers: {error}") from error


def _of_rows(features_ND: np.ndarray) -> Statistics:
    rows = np.array(features_ND, np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("There are features that are not finite: of broken weights or pictures.")
    mean = rows.mean(axis=0)
    rows -= mean
    return Statistics(mean, rows.T @ rows / max(len(rows) - 1, 1), len(rows))
