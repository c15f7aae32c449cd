"""The path between data and noise: its ends, its derivative, its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import flow

RNG = np.random.default_rng(0)
X, NOISE = RNG.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)


def test_the_path_runs_from_data_to_noise_row_by_row():
    path = flow.interpolate(X, NOISE, jnp.array([0.0, 1.0, 0.25]))
    np.testing.assert_array_equal(path[0], X[0])
    np.testing.assert_array_equal(path[1], NOISE[1])
    np.testing.assert_allclose(path[2], 0.75 * X[2] + 0.25 * NOISE[2], rtol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_velocity_is_the_derivative_of_the_path(t):
    at, one = jnp.full(3, t), jnp.ones(3)
    _, derivative = jax.jvp(lambda t_B: flow.interpolate(X, NOISE, t_B), (at,), (one,))
    np.testing.assert_allclose(flow.velocity(X, NOISE), derivative, atol=1e-6)
    step = flow.interpolate(X, NOISE, at + 0.5) - flow.interpolate(X, NOISE, at - 0.5)
    np.testing.assert_allclose(flow.velocity(X, NOISE), step, atol=1e-6)


def test_the_error_is_a_mean_of_each_row_in_float32():
    low = jnp.asarray(X, jnp.bfloat16)
    error = flow.mse_B(low, NOISE)
    assert error.shape == (3,) and error.dtype == jnp.float32
    exact = ((np.float64(low) - np.float64(NOISE)) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(error, exact, rtol=1e-5)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        flow.interpolate(X, NOISE[:1], jnp.zeros(3))
    with pytest.raises(AssertionError):
        flow.mse_B(X, NOISE[..., :1])
