"""Confidence intervals, all of 95%."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

_RESAMPLES = 2000


def wilson(passed: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    z = 1.959964
    share, spread = passed / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(passes: Sequence[bool]) -> dict[str, Any]:
    """Fraction, passed, n, and Wilson's interval of the fraction."""
    passed, n = int(sum(passes)), len(passes)
    return {
        "fraction": passed / n if n else float("nan"),
        "passed": passed,
        "n": n,
        "interval": wilson(passed, n),
    }


def resampled(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Interval of a mean over groups of what is drawn in clusters: images of prompts of kinds.

    Clusters are resampled within their group (a stratified cluster bootstrap, 2000 times, always
    with the same randomness); a group's value is the mean of all in its clusters.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(_RESAMPLES)
    for group in groups:
        sums = np.array([np.sum(cluster) for cluster in group], np.float64)
        counts = np.array([len(cluster) for cluster in group], np.float64)
        drawn = rng.integers(len(group), size=(_RESAMPLES, len(group)))
        means += sums[drawn].sum(1) / counts[drawn].sum(1) / len(groups)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
