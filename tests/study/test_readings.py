"""Readings: against least squares, by simulation, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from t2i_jax.study import readings
from t2i_jax.study.readings import CLEAR, LIKELY, OPEN, Difference, Spread


def table(rng, rows, seeds, sigma=1.0, shared=1.0):
    levels, effects = rng.standard_normal((rows, 1)), shared * rng.standard_normal(seeds)
    return levels + effects + sigma * rng.standard_normal((rows, seeds))


def values(y):
    return {f"row {i}": dict(enumerate(line.tolist())) for i, line in enumerate(y)}


def test_the_spread_is_that_of_least_squares_on_rows_and_seeds():
    y = table(np.random.default_rng(0), 5, 3)
    rows, seeds = (np.ravel(i) for i in np.indices(y.shape))
    design = np.column_stack([rows[:, None] == np.arange(5), seeds[:, None] == np.arange(1, 3)])
    _, squares, rank, _ = np.linalg.lstsq(design.astype(float), y.ravel(), rcond=None)
    found = readings.spread(values(y))
    assert found.freedom == y.size - rank == 8
    assert found.sigma == pytest.approx(math.sqrt(squares[0] / 8))


def test_a_reference_with_its_own_noise_changes_nothing():
    y = table(np.random.default_rng(1), 6, 3)
    whole = readings.spread(values(y[1:]))
    assert readings.spread(values(y[1:] - y[0])) == pytest.approx(whole)


def test_one_difference_with_two_rows_is_the_paired_t_test():
    y = table(np.random.default_rng(2), 2, 5)
    found = readings.differences(
        {"b": values(y)["row 1"]}, {"b": values(y)["row 0"]}, readings.spread(values(y))
    )["b"]
    low, high = stats.ttest_rel(y[1], y[0]).confidence_interval(0.95)
    assert found.value == pytest.approx((low + high) / 2)
    assert found.half == found.all_at_once == pytest.approx((high - low) / 2)
    assert found.seeds == 5


def test_intervals_hold_as_often_as_they_say():
    rng, trials, alone, together = np.random.default_rng(3), 1500, [], []
    for _ in range(trials):
        levels = rng.standard_normal((8, 1))
        y = values(levels + rng.standard_normal(3) + 0.5 * rng.standard_normal((8, 3)))
        rest = {row: v for row, v in y.items() if row != "row 0"}
        reference = {row: y["row 0"] for row in rest}
        found = readings.differences(rest, reference, readings.spread(y))
        errors = [
            abs(d.value - (levels[i + 1, 0] - levels[0, 0])) for i, d in enumerate(found.values())
        ]
        alone += [e <= d.half for e, d in zip(errors, found.values(), strict=True)]
        together.append(
            all(e <= d.all_at_once for e, d in zip(errors, found.values(), strict=True))
        )
    assert np.mean(alone) == pytest.approx(0.95, abs=0.015)
    assert 0.95 - 0.015 <= np.mean(together) <= 0.985  # Bonferroni is a little wide


def test_the_mean_of_a_row_has_the_pooled_spread_within_rows():
    y = {"a": {0: 1.0, 1: 3.0}, "b": {0: 5.0, 1: 6.0, 2: 10.0}, "floor": {0: 0.0, 1: 0.0}}
    found = readings.means(y, ["floor"])
    sigma = math.sqrt((2.0 + 14.0) / 3)
    assert found["b"].value == 7 and found["b"].seeds == 3
    assert found["b"].half == pytest.approx(stats.t.ppf(0.975, 3) * sigma / math.sqrt(3))
    assert found["floor"] == (0.0, None, 2)


def test_one_seed_has_no_interval():
    y = {"a": {0: 1.0}, "b": {0: 2.0}}
    assert readings.means(y)["a"].half is None
    found = readings.differences({"b": y["b"]}, {"b": y["a"]}, readings.spread(y))["b"]
    assert found == (1.0, None, None, 1) and found.sign == OPEN


@pytest.mark.parametrize("y", [{}, {"a": {0: 1.0, 1: 2.0}}, {"a": {0: 1.0}, "b": {0: 2.0}}])
def test_what_too_few_values_cannot_tell(y):
    assert readings.spread(y) == (0.0, 0) and readings.differences({}, {}, Spread(0.0, 0)) == {}


def test_only_common_seeds_are_compared():
    found = readings.differences(
        {"b": {0: 2.0, 1: 9.0}, "c": {2: 1.0}},
        {"b": {0: 1.0, 5: 3.0}, "c": {0: 1.0}},
        Spread(1.0, 4),
    )
    assert list(found) == ["b"] and found["b"].value == 1.0 and found["b"].seeds == 1


@pytest.mark.parametrize(
    ("value", "sign"), [(0.05, OPEN), (-0.15, LIKELY), (0.25, CLEAR), (-0.25, CLEAR)]
)
def test_signs(value, sign):
    assert Difference(value, 0.1, 0.2, 3).sign == sign


def test_curves_are_read_between_their_points():
    curve = [[10, 0.0], [20, 1.0], [40, 2.0]]
    assert readings.at(curve, 15) == 0.5 and readings.at(curve, 30) == 1.5
    assert readings.at(curve, 40) == 2.0 and readings.at(curve, 9) is None
    assert readings.at([], 9) is None
