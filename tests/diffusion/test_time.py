"""Noise levels of training and sampling against their distributions and formulas."""

import jax
import numpy as np
import pytest
from scipy import stats

from t2i_jax.diffusion import time


def test_the_shift_keeps_both_ends_and_moves_the_middle_towards_noise():
    sigma = np.linspace(0, 1, 101)
    for shift in (0.5, 1.0, 3.0):
        moved = time.shift_sigma(sigma, shift)
        assert moved[0] == 0 and moved[-1] == pytest.approx(1)
        assert (np.diff(moved) > 0).all()
        np.testing.assert_allclose(time.shift_sigma(moved, 1 / shift), sigma, atol=1e-12)
    assert time.shift_sigma(0.5, 3.0) == 0.75  # 3 / 2 over 1 + 2 / 2
    np.testing.assert_array_equal(time.shift_sigma(sigma, 1.0), sigma)
    odds = time.shift_sigma(0.2, 3.0) / (1 - time.shift_sigma(0.2, 3.0))
    assert odds == pytest.approx(3 * 0.2 / 0.8)  # the shift multiplies the odds


def test_the_training_levels_fall_from_noise_to_almost_data():
    plain, shifted = (time.training_sigmas(4, shift) for shift in (1.0, 3.0))
    np.testing.assert_allclose(plain, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(shifted, [1, 0.9, 0.75, 0.5])
    assert shifted.dtype == np.float32


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.8, 0.6, 1.0)])
def test_training_times_are_logit_normal(mean, std, shift):
    """The level of index floor(N u) is the shifted 1 - floor(N u) / N; u is logit-normal."""
    n = 1000
    draws = np.asarray(
        time.sample_times(
            jax.random.key(7), 20_000, num_timesteps=n, shift=shift, mean=mean, std=std
        ),
        np.float64,
    )
    assert np.isin(draws.astype(np.float32), time.training_sigmas(n, shift)).all()
    index = n * (1 - draws / (shift - (shift - 1) * draws))  # unshifted
    np.testing.assert_allclose(index, np.round(index), atol=0.02)
    u = (np.round(index) + np.random.default_rng(0).random(len(index))) / n  # within its cell

    def cumulative(u):
        return stats.norm.cdf((np.log(u) - np.log1p(-u) - mean) / std)

    assert stats.kstest(u, cumulative).pvalue > 0.01


def test_each_level_is_drawn_as_often_as_its_cell_says():
    """Index i of four is a u between i / 4 and (i + 1) / 4; u = 1/2 is the median."""
    draws = time.sample_times(
        jax.random.key(8), 40_000, num_timesteps=4, shift=1.0, mean=0.3, std=1.0
    )
    edges = stats.norm.cdf(np.array([-np.inf, np.log(1 / 3), 0.0, np.log(3), np.inf]) - 0.3)
    often = [(np.asarray(draws) == level).mean() for level in (1.0, 0.75, 0.5, 0.25)]
    np.testing.assert_allclose(often, np.diff(edges), atol=0.01)


def test_draws_depend_on_the_key_alone():
    arguments = {"num_timesteps": 100, "shift": 1.0, "mean": 0.0, "std": 1.0}
    one, again, other = (time.sample_times(jax.random.key(k), 64, **arguments) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != other).mean() > 0.8


def test_extreme_draws_stay_in_the_table():
    for mean in (-200.0, 200.0):
        times = time.sample_times(
            jax.random.key(0), 8, num_timesteps=10, shift=1.0, mean=mean, std=1.0
        )
        np.testing.assert_allclose(times, np.float32(1.0 if mean < 0 else 0.1))


def test_the_sampling_levels_are_shifted_twice_and_end_at_zero():
    np.testing.assert_allclose(
        time.sampling_sigmas(4, 1000, 1.0), [1, 0.667, 0.334, 0.001, 0], atol=1e-6
    )
    last = time.training_sigmas(1000, 3.0)[-1]
    even = np.linspace(1, last, 3)
    expected = [*(3 * even / (1 + 2 * even)), 0]
    np.testing.assert_allclose(time.sampling_sigmas(3, 1000, 3.0), expected, rtol=1e-6)
    np.testing.assert_allclose(time.sampling_sigmas(1, 1000, 3.0), [1, 0])


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_a_number_of_steps_that_the_table_has_not_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: a sampler takes 1 to 10"):
        time.sampling_sigmas(steps, 10, 1.0)
