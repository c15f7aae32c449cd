"""How far the features of two sets of pictures are from each other, and how sure that is.

**Frechet distance** (Heusel et al., arXiv 1706.08500; Dowson and Landau, 1982). The Wasserstein-2
distance of N(m_1, A) and N(m_2, B) squared is

    |m_1 - m_2|^2 + tr A + tr B - 2 max_C tr C,

over the cross-covariances C that leave [[A, C], [C^T, B]] positive semi-definite. With R and Q the
symmetric roots of A and B, these are C = R K Q with |K| <= 1, and tr C = tr(K Q R) is largest where
it is the sum of the singular values of Q R: the trace of (Q A Q)^(1/2). Q A Q is symmetric and
positive semi-definite, also where A or B is singular, so its eigenvalues are real, and what
rounding makes negative is zero. (The published code takes the root of A B, which is not symmetric
and, as rounded, now and then complex; where it is there, it has the same trace.)

**Kernel distances** are squared maximum mean discrepancies (Gretton et al., JMLR 13, 2012),

    E k(x, x') + E k(y, y') - 2 E k(x, y):

KID (Binkowski et al., arXiv 1801.01401) has k = (x . y / D + 1)^3 and the unbiased estimate, over
pairs of different features; CMMD (Jayasumana et al., arXiv 2401.09603) has 1000 times the estimate
of least variance, over all pairs, for k = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, of CLIP's
embeddings on the unit sphere.

**Intervals** are of 95 % and tell of the pictures that are measured, each with its prompt: several
of one prompt count as independent, which makes them a little narrow. The reference is taken as it
is. FID's is a jackknife by groups. A bootstrap would be wrong: a sample with repetitions has fewer
different features, and FID has a bias of the order 1 / n, so that all of its values lie above the
one that they are to tell of. Leaving out a group moves all values by the same bias, which their
spread does not see. Nor does the interval hold that bias: only FIDs of the same number of pictures
can be compared.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from t2i_jax.evaluation.statistics import Statistics

_LEVEL = 0.95
_ROWS = 1024  # of a kernel's matrix that are held at once
SIGMA, SCALE = 10.0, 1000.0  # of CMMD


class Estimate(NamedTuple):
    """A number, and how far another set of as many pictures may be from it."""

    value: float
    interval: tuple[float, float]  # 95 %
    n: int  # pictures


class KID(NamedTuple):
    """Over the subsets, as published."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def frechet(a: Statistics, b: Statistics) -> float:
    """The squared distance of two Gaussians. Raises ValueError for other widths, or one feature."""
    _check_pair(a, b)
    return _frechet(a, b, _root(b.covariance))


def fid(features_ND: np.ndarray, reference: Statistics, *, groups: int = 20) -> Estimate:
    """The Frechet distance of features to a reference.

    The interval is by leaving out every `groups`-th feature in turn; fewer groups than features.
    Each costs one decomposition: 2048 features take some seconds.
    """
    whole = Statistics.of(features_ND)
    _check_pair(whole, reference)
    if not 2 <= groups < whole.n:
        raise ValueError(f"{groups} groups of {whole.n} features: 2 or more, less than features.")
    root = _root(reference.covariance)
    parts = (Statistics.of(features_ND[i::groups]) for i in range(groups))
    left = [_frechet(whole.without(part), reference, root) for part in parts]
    return _jackknife(_frechet(whole, reference, root), np.array(left), whole.n)


def kid(
    x_ND: np.ndarray,
    y_ND: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KID:
    """KID of two sets of Inception features: mean and deviation over random subsets.

    Raises ValueError where a set is smaller than a subset.
    """
    _check(x_ND, y_ND)
    least = min(len(x_ND), len(y_ND))
    if not 2 <= subset_size <= least:
        raise ValueError(
            f"subset_size = {subset_size}, but the smaller set has {least} features: KIDs are "
            "compared at the same subset_size, which is 2 or more and not larger than a set."
        )
    rng = np.random.default_rng(seed)

    def draw(features):
        return np.float64(features[rng.choice(len(features), subset_size, replace=False)])

    values = [_kernel_distance(draw(x_ND), draw(y_ND)) for _ in range(subsets)]
    return KID(float(np.mean(values)), float(np.std(values)), subsets, subset_size)


def cmmd(x_ND: np.ndarray, y_ND: np.ndarray) -> Estimate:
    """CMMD of embeddings x of pictures to embeddings y of a reference, normalised here.

    The interval is a jackknife, by leaving out each picture in turn: sums of rows are all it needs.
    """
    _check(x_ND, y_ND)
    x, y = _unit(x_ND), _unit(y_ND)
    n, m = len(x), len(y)
    # Of k - 1, for k is close to one, and what is added to all pairs cancels.
    xx_N, xy_N, yy_M = _sums(x, x), _sums(x, y), _sums(y, y)
    reference = yy_M.sum() / m**2
    value = xx_N.sum() / n**2 - 2 * xy_N.sum() / (n * m) + reference
    left_N = (xx_N.sum() - 2 * xx_N) / (n - 1) ** 2  # its own pair is k - 1 = 0
    left_N = left_N - 2 * (xy_N.sum() - xy_N) / ((n - 1) * m) + reference
    return _jackknife(SCALE * value, SCALE * left_N, n)


def clip_score(images_NP: np.ndarray, texts_NP: np.ndarray) -> Estimate:
    """The mean of 100 max(cos, 0) of each picture's embedding and its own prompt's.

    This is what papers on text-to-image models report, of a CLIP that they name; Hessel et al.
    (arXiv 2104.08718), whose weight is 2.5, not 100, have a fortieth of it. Raises ValueError where
    they are no pairs, or fewer than two.
    """
    _check(images_NP, texts_NP)
    if len(images_NP) != len(texts_NP):
        raise ValueError(f"{len(images_NP)} pictures and {len(texts_NP)} prompts are no pairs.")
    cosines_N = np.sum(_unit(images_NP) * _unit(texts_NP), axis=1)
    scores_N = 100.0 * np.maximum(cosines_N, 0.0)
    n = len(scores_N)
    reach = _quantile(n - 1) * scores_N.std(ddof=1) / np.sqrt(n)
    value = float(scores_N.mean())
    return Estimate(value, (value - float(reach), value + float(reach)), n)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _frechet(a: Statistics, b: Statistics, root_of_b: np.ndarray) -> float:
    product = root_of_b @ a.covariance @ root_of_b
    values = np.linalg.eigvalsh((product + product.T) / 2)
    overlap = np.sqrt(np.maximum(values, 0.0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(np.sum((a.mean - b.mean) ** 2) + traces - 2.0 * overlap), 0.0)


def _jackknife(value: float, left_G: np.ndarray, n: int) -> Estimate:
    """From the values without each of G groups of one size (Efron and Tibshirani, 1993, 11.2)."""
    groups = len(left_G)
    deviation = np.sqrt((groups - 1) * np.mean((left_G - left_G.mean()) ** 2))
    reach = float(_quantile(groups - 1) * deviation)
    return Estimate(float(value), (max(float(value) - reach, 0.0), float(value) + reach), n)


def _quantile(freedom: int) -> float:
    """Of Student's t: what it exceeds, either way, in 5 % of all cases."""
    return float(special.stdtrit(freedom, (1 + _LEVEL) / 2))


def _kernel_distance(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Unbiased, of KID's kernel; two sets of one size."""
    n, width = x_ND.shape

    def of_others(z_ND):
        kernel = (z_ND @ z_ND.T / width + 1.0) ** 3
        return (kernel.sum() - np.trace(kernel)) / (n * (n - 1))

    return of_others(x_ND) + of_others(y_ND) - 2.0 * np.mean((x_ND @ y_ND.T / width + 1.0) ** 3)


def _sums(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """sum_j (k(x_i, y_j) - 1) of CMMD's kernel, for vectors of length one: (n,)."""
    parts = (x_ND[i : i + _ROWS] @ y_MD.T for i in range(0, len(x_ND), _ROWS))
    return np.concatenate([np.expm1((cosine - 1.0) / SIGMA**2).sum(axis=1) for cosine in parts])


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = np.float64(x_ND)
    lengths_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    if not lengths_N1.all():
        raise ValueError("There are embeddings that are zero.")
    return x_ND / lengths_N1


def _check(*sets: np.ndarray) -> None:
    """Features (n, D), two or more, of one width, finite."""
    shapes = [np.shape(features) for features in sets]
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes):
        raise ValueError(f"Features are (n, D), two or more in each set; got {shapes}.")
    if len({width for _, width in shapes}) > 1:
        raise ValueError(f"Features of other widths cannot be compared: {shapes}.")
    if not all(np.isfinite(features).all() for features in sets):
        raise ValueError("There are features that are not finite: of broken weights or pictures.")


def _check_pair(a: Statistics, b: Statistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Features of widths {len(a.mean)} and {len(b.mean)}: of other networks.")
    if 1 in (a.n, b.n):
        raise ValueError("One picture has no covariance; two or more are compared.")
