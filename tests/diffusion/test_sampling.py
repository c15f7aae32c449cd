"""Euler's method and guidance against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import sampling, time

NOISE = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
SIGMAS = [1.0, 0.7, 0.3, 0.05, 0.0]


def test_euler_on_a_linear_field_is_a_product():
    """dz/dt = a z: every step multiplies by 1 + dt a."""
    a = jnp.array([[0.3], [-2.0], [1.5]])
    z = jax.jit(lambda n: sampling.euler(lambda z, t_B: a * z, n, SIGMAS))(NOISE)
    factor = np.prod(
        [1 + (t1 - t0) * np.asarray(a) for t0, t1 in itertools.pairwise(SIGMAS)], axis=0
    )
    np.testing.assert_allclose(z, factor * NOISE, rtol=1e-5)


def test_euler_sees_the_level_that_a_step_starts_from():
    """dz/dt = t: the sum of the rectangles' left sides, each row with the same t."""
    seen = []

    def velocity(z, t_B):
        jax.debug.callback(lambda t: seen.append(np.array(t)), t_B, ordered=True)
        return jnp.broadcast_to(t_B[:, None, None], z.shape)

    z = sampling.euler(velocity, NOISE, SIGMAS)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [[t, t] for t in SIGMAS[:-1]], rtol=1e-6)
    area = sum(t0 * (t1 - t0) for t0, t1 in itertools.pairwise(SIGMAS))
    np.testing.assert_allclose(z, NOISE + area, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_is_exact_where_the_data_are_one_point(steps):
    """All noise flows to x0 in straight lines, v = (z - x0) / t: any number of steps arrives."""
    x0 = np.random.default_rng(1).standard_normal(NOISE.shape[1:]).astype(np.float32)
    sigmas = time.sampling_sigmas(steps, 1000, 3.0)
    z = sampling.euler(lambda z, t_B: (z - x0) / t_B[:, None, None], NOISE, sigmas)
    np.testing.assert_allclose(z, np.broadcast_to(x0, z.shape), atol=1e-5)


def test_many_steps_turn_noise_into_gaussian_data():
    """x ~ N(m, s^2): v = E[n - x | z] is known, and the samples must be m + s noise."""
    m, s = 0.7, 0.4

    def velocity(z, t_B):
        t = t_B[:, None, None]
        gain = (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2)
        return gain * (z - (1 - t) * m) - m

    z = sampling.euler(velocity, NOISE, np.linspace(1, 0, 1001))
    np.testing.assert_allclose(z, m + s * NOISE, atol=5e-3)


def test_guidance_is_an_extrapolation_from_the_null_prompt():
    v, null = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(sampling.guide(v, null, 6.0), [13.0, -4.0])
    np.testing.assert_allclose(sampling.guide(v, null, 1.0), v)
    np.testing.assert_allclose(sampling.guide(v, null, 0.0), null)


def denoise(z, t_B, memory):
    """A field that tells memory, time and latents apart."""
    return memory[:, None, None] * z + t_B[:, None, None]


@pytest.mark.parametrize("scale", [0.0, 3.0, jnp.float32(1.0)])
def test_both_prompts_are_read_in_one_batch(scale):
    calls = []

    def counted(z, t_B, memory):
        calls.append(z.shape[0])
        return denoise(z, t_B, memory)

    memory, null, t_B = jnp.array([2.0, 5.0]), jnp.array([-1.0, 0.5]), jnp.array([0.3, 0.3])
    v = sampling.guided(counted, memory, null, scale, lambda *x: jnp.stack(x, 1).ravel())(
        NOISE, t_B
    )
    assert calls == [4]
    mixed = np.asarray(null + scale * (memory - null))[:, None, None]
    np.testing.assert_allclose(v, mixed * NOISE + 0.3, rtol=1e-5, atol=1e-6)


def test_at_scale_one_the_null_prompt_is_never_evaluated():
    def never(*_):
        raise AssertionError

    for scale in (1, 1.0):
        v = sampling.guided(denoise, jnp.array([2.0, 5.0]), None, scale, never)
        expected = np.array([2.0, 5.0])[:, None, None] * NOISE
        np.testing.assert_allclose(v(NOISE, jnp.zeros(2)), expected, rtol=1e-6)
