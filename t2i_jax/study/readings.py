"""What seeds say of designs: means and differences with their uncertainty.

A value y_rs of row r and seed s is modelled as

    y_rs = m_r + b_s + e_rs,    e_rs ~ N(0, sigma^2)

with a level m_r of the design, an effect b_s that all designs share (the same seed has the same
data in the same order and the same test prompts), and what is left. With few seeds a row alone
tells next to nothing of sigma, so all rows tell it together: the residuals of rows and seeds,
over (R - 1)(S - 1) degrees of freedom. Controls that sit at the floor are left out of that.

The 95% interval of a difference of two rows is its mean over the common seeds
+- t sigma sqrt(2 / S); Student's t has the degrees of freedom of sigma. Where K rows are compared
with one, that of level 1 - 0.05 / K holds for all of them at once (Bonferroni): what is outside
that is called clear, what is outside the first alone is called likely, anything else is not
separated. The interval of a row's own mean has the spread within rows, b_s and all:
+- t sqrt(SS_within / (sum (n_r - 1))) / sqrt(n_r).
"""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

Values = Mapping[str, Mapping[int, float]]  # row -> seed -> value
_LEVEL = 0.05
CLEAR, LIKELY, OPEN = "clear", "likely", "not separated"


class Reading(NamedTuple):
    """A mean over seeds; `half` the width of its 95% interval, None where seeds do not tell it."""

    value: float
    half: float | None
    seeds: int


class Difference(NamedTuple):
    """A difference, the half width of its interval alone and of all at once, and the verdict."""

    value: float
    half: float | None
    all_at_once: float | None
    seeds: int

    @property
    def sign(self) -> str:
        """CLEAR, LIKELY or OPEN."""
        if self.half is None or self.all_at_once is None or abs(self.value) <= self.half:
            return OPEN
        return CLEAR if abs(self.value) > self.all_at_once else LIKELY


def means(values: Values, floor: Iterable[str] = ()) -> dict[str, Reading]:
    """The mean of every row; rows in `floor` do not tell the spread, nor is it theirs."""
    floor = set(floor)
    sigma, freedom = _within(values, floor)
    found = {}
    for row, by_seed in values.items():
        count = len(by_seed)
        known = freedom and row not in floor
        half = _t(freedom) * sigma / math.sqrt(count) if known else None
        found[row] = Reading(float(np.mean(list(by_seed.values()))), half, count)
    return found


class Spread(NamedTuple):
    """sigma, and its degrees of freedom; 0 of these where the values do not tell it."""

    sigma: float
    freedom: int


def spread(values: Values, floor: Iterable[str] = ()) -> Spread:
    """Of one value about its row and seed, by the rows that have all seeds, but those in `floor`.

    Values may be differences to a reference that has its own noise: that is the same for all rows,
    and goes with the seeds' effects.
    """
    floor = set(floor)
    kept = {row: by_seed for row, by_seed in values.items() if row not in floor}
    seeds = sorted({seed for by_seed in kept.values() for seed in by_seed})
    full = [[v[seed] for seed in seeds] for v in kept.values() if len(v) == len(seeds)]
    if len(full) < 2 or len(seeds) < 2:
        return Spread(0.0, 0)
    freedom = (len(full) - 1) * (len(seeds) - 1)
    table = np.array(full)
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return Spread(math.sqrt(float(np.sum(left**2)) / freedom), freedom)


def differences(values: Values, reference: Values, scale: Spread) -> dict[str, Difference]:
    """Every row of `values` minus its own `reference`, over the seeds that both have.

    `reference` holds, for each row, the values that it is compared with: those of another row, at
    the same step or after as many FLOPs. Rows without a common seed are left out.
    """
    paired = {
        row: [y - reference[row][seed] for seed, y in by_seed.items() if seed in reference[row]]
        for row, by_seed in values.items()
    }
    paired = {row: found for row, found in paired.items() if found}
    out = {}
    for row, found in paired.items():
        half = everywhere = None
        if scale.freedom:
            error = scale.sigma * math.sqrt(2 / len(found))
            half = _t(scale.freedom) * error
            everywhere = _t(scale.freedom, len(paired)) * error
        out[row] = Difference(float(np.mean(found)), half, everywhere, len(found))
    return out


def at(curve: Sequence[Sequence[float]], step: float) -> float | None:
    """A curve of (step, value) read between its points; None before its first one."""
    steps, values = zip(*curve, strict=True) if curve else ((), ())
    if not curve or step < steps[0]:
        return None
    return float(np.interp(step, steps, values))


def _within(values: Values, floor: set[str]) -> tuple[float, int]:
    """Standard deviation within rows, and its degrees of freedom."""
    groups = [list(v.values()) for row, v in values.items() if row not in floor and len(v) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.sum((np.array(g) - np.mean(g)) ** 2)) for g in groups)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def _t(freedom: int, count: int = 1) -> float:
    """Student's t, both sides together _LEVEL / count."""
    return float(stats.t.ppf(1 - _LEVEL / 2 / count, freedom))
