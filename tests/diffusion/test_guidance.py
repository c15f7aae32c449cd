"""Guidance against the formulas of its papers, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import guidance, solvers
from t2i_jax.diffusion.guidance import METHODS, Guidance

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4, 2)
Z, V, NULL = (RNG.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
MEMORY, NULL_MEMORY = jnp.array([2.0, 5.0]), jnp.array([-1.0, 0.5])
LEVELS = [1.0, 0.8, 0.5, 0.2, 0.0]
T = 0.8


def denoise(z, t_B, memory):
    """A field that tells memory, time and latents apart."""
    return memory[:, None, None, None] * z + t_B[:, None, None, None] + z**2


def join(*memories):
    return jnp.stack(memories, 1).ravel()


def velocity(how, scale, state=None, z=Z, t=T, counts=None):
    """The guided velocity at level t, and what is carried on."""

    def counted(z, t_B, memory):
        if counts is not None:
            jax.debug.callback(lambda: counts.append(len(z)))
        return denoise(z, t_B, memory)

    field = guidance.guided(counted, MEMORY, NULL_MEMORY, how, join)
    table = how.rows(scale, LEVELS)
    row = {key: value[LEVELS.index(t)] for key, value in table.items()}
    state = guidance.first(how, z) if state is None else state
    v, state = jax.jit(field)(z, jnp.full(len(z), t), row, state)
    jax.effects_barrier()
    return np.asarray(v), state


def both(z=Z, t=T):
    t_B = np.full(len(z), t, np.float32)
    return (np.asarray(denoise(z, t_B, memory), np.float64) for memory in (MEMORY, NULL_MEMORY))


def test_plain_guidance_is_an_extrapolation_from_the_null_prompt():
    v, null = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(guidance.plain(v, null, 6.0), [13.0, -4.0])
    np.testing.assert_allclose(guidance.plain(v, null, 1.0), v)
    np.testing.assert_allclose(guidance.plain(v, null, 0.0), null)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_both_prompts_are_read_in_one_batch(scale):
    counts = []
    found, state = velocity(Guidance(), scale, counts=counts)
    v, null = both()
    assert counts == [4] and state == ()
    np.testing.assert_allclose(found, null + scale * (v - null), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_conditional_velocity_at_scale_one(method):
    found, _ = velocity(Guidance(method), 1.0)
    np.testing.assert_allclose(found, next(both()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_differs_from_plain_guidance_where_it_should(method):
    found, _ = velocity(Guidance(method), 5.0)
    plain, _ = velocity(Guidance(), 5.0)
    assert np.allclose(found, plain, atol=1e-3) == (method == "plain")


def test_without_the_null_prompt_nothing_is_joined():
    field = guidance.conditional(denoise, MEMORY)
    v, state = field(Z, jnp.full(2, T), {}, ())
    np.testing.assert_allclose(v, next(both()), rtol=1e-6)
    assert state == ()


def test_outside_its_interval_the_prompt_alone_is_evaluated():
    how = Guidance(interval=(0.2, 0.8))
    np.testing.assert_array_equal(how.rows(4.0, LEVELS)["scale"], [1, 4, 4, 1])
    for t, rows in ((1.0, 2), (0.8, 4), (0.5, 4), (0.2, 2)):
        counts = []
        found, _ = velocity(how, 4.0, t=t, counts=counts)
        v, null = both(t=t)
        expected = null + 4 * (v - null) if rows == 4 else v
        assert counts == [rows], t
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not Guidance().limited and how.limited


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_images_have_the_deviation_of_the_conditional_one(share):
    found, _ = velocity(Guidance("rescaled", rescale=share), 5.0)
    v, null = both()
    plain = null + 5 * (v - null)
    for image in range(2):
        same = plain[image] * v[image].std() / plain[image].std()
        expected = share * same + (1 - share) * plain[image]
        np.testing.assert_allclose(found[image], expected, rtol=1e-4, atol=1e-4)


def test_cfg_zero_starts_from_the_nearest_multiple_of_the_null_velocity():
    found, _ = velocity(Guidance("cfg-zero"), 5.0)
    v, null = both()
    for image in range(2):
        a, b = v[image].ravel(), null[image].ravel()
        (s,), *_ = np.linalg.lstsq(b[:, None], a, rcond=None)
        expected = s * b + 5 * (a - s * b)
        np.testing.assert_allclose(found[image].ravel(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [0.0, 2.5])
@pytest.mark.parametrize("parallel", [0.0, 0.4])
def test_projected_guidance_step_by_step(norm, parallel):
    """Twice, so that the momentum is seen: the sum of changes is of what was not yet cut."""
    how = Guidance("apg", norm=norm, parallel=parallel, momentum=-0.5)
    state, sums = None, np.zeros(SHAPE)
    for t in (0.8, 0.5):
        found, state = velocity(how, 5.0, state, t=t)
        v, null = both(t=t)
        x, x_null = Z - t * v, Z - t * null
        sums = (x - x_null) - 0.5 * sums
        for image in range(2):
            d, along = sums[image].ravel(), x[image].ravel()
            if norm:
                d = d * min(1, norm / np.linalg.norm(d))
            along = d @ along / (along @ along) * along
            guided = x[image].ravel() + 4 * (d - along + parallel * along)
            expected = (Z[image].ravel() - guided) / t
            np.testing.assert_allclose(found[image].ravel(), expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(state, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_guidance_goes_through_every_solver(solver):
    """The state of APG is carried from evaluation to evaluation; rows of both tables fit."""
    how = Guidance("apg", interval=(0.1, 0.9))
    field = guidance.guided(denoise, MEMORY, NULL_MEMORY, how, join)
    rows = solvers.plan(solver, LEVELS) | how.rows(3.0, LEVELS)
    z = 0.1 * Z
    found = solvers.solve(solver, field, z, rows, guidance.first(how, z), lambda number: 0 * z)
    assert np.isfinite(found).all() and found.shape == SHAPE


def test_a_method_tells_the_numbers_that_it_reads():
    assert Guidance().told() == {"method": "plain"}
    assert Guidance("apg", norm=15.0, interval=(0.2, 1.0)).told() == {
        "method": "apg",
        "parallel": 0.0,
        "norm": 15.0,
        "momentum": -0.5,
        "interval": [0.2, 1.0],
    }
