"""Solvers against closed forms, and against their orders of convergence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import solvers, time
from t2i_jax.errors import ConfigError

NOISE = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
LEVELS = [1.0, 0.7, 0.3, 0.05, 0.0]
MEAN, SPREAD = 0.7, 0.4
DETERMINISTIC = [name for name in solvers.SOLVERS if name != "ancestral"]


def solve(name, field, z, levels, **more):
    """The latents after all steps of a field (z, t (B, 1, 1)) -> v."""
    rows = solvers.plan(name, levels)

    def velocity(z, t_B, row, guide):
        return field(z, t_B.reshape(-1, *(1,) * (z.ndim - 1))), guide

    return jax.jit(lambda z, rows: solvers.solve(name, velocity, z, rows, **more))(z, rows)


def gaussian(z, t):
    """E[n - x | z] where x ~ N(MEAN, SPREAD^2)."""
    gain = (t - (1 - t) * SPREAD**2) / (t**2 + (1 - t) ** 2 * SPREAD**2)
    return gain * (z - (1 - t) * MEAN) - MEAN


def exact(z, start, end):
    """Along the flow of Gaussians, the distance from the mean in deviations stays."""

    def moments(t):
        return (1 - t) * MEAN, np.sqrt(t**2 + (1 - t) ** 2 * SPREAD**2)

    (m0, s0), (m1, s1) = moments(start), moments(end)
    return m1 + s1 * (z - m0) / s0


def slopes(name, field, truth, start, end, steps=(20, 40, 80)):
    """By how many powers of two the largest error falls when the steps are halved."""
    found = []
    for count in steps:
        z = solve(name, field, NOISE, np.linspace(start, end, count + 1))
        found.append(np.abs(np.asarray(z) - truth(NOISE, start, end)).max())
    return np.log2(np.array(found[:-1]) / found[1:])


# Inside, and with the first and the last step, which are of first order where x is predicted.
ORDERS = {
    "euler": (1, 1),
    "heun": (2, 2),
    "midpoint": (2, 2),
    "dpmpp_2m": (2, 1.5),
    "unipc": (3, 2),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_on_gaussian_data(name):
    inside, whole = ORDERS[name]
    assert slopes(name, gaussian, exact, 0.95, 0.05)[-1] > inside - 0.2
    steps = (10, 20) if name == "midpoint" else (80, 160)  # it is at float32's end by then
    assert slopes(name, gaussian, exact, 1.0, 0.0, steps)[-1] > whole - 0.2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_on_a_linear_field(name):
    """dz/dt = 2 z, where no order is better than it has to be."""

    def truth(z, start, end):
        return z * np.exp(2 * (end - start))

    order, _ = ORDERS[name]
    assert slopes(name, lambda z, t: 2 * z, truth, 0.9, 0.1)[-1] == pytest.approx(order, abs=0.35)


def test_euler_on_a_linear_field_is_a_product():
    """dz/dt = a z: every step multiplies by 1 + dt a."""
    a = jnp.array([[0.3], [-2.0], [1.5]])
    z = solve("euler", lambda z, t: a * z, NOISE, LEVELS)
    factor = np.prod(
        [1 + (t1 - t0) * np.asarray(a) for t0, t1 in itertools.pairwise(LEVELS)], axis=0
    )
    np.testing.assert_allclose(z, factor * NOISE, rtol=1e-5)


def test_heun_and_midpoint_on_a_linear_field_are_products():
    """dz/dt = a z: 1 + h a + (h a)^2 / 2 both, but for Heun's last step to 0."""
    h = -0.25
    z = solve("midpoint", lambda z, t: 1.5 * z, NOISE, [1, 0.75, 0.5, 0.25, 0])
    both = 1 + 1.5 * h + (1.5 * h) ** 2 / 2
    np.testing.assert_allclose(z, both**4 * NOISE, rtol=1e-5)
    z = solve("heun", lambda z, t: 1.5 * z, NOISE, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(z, both**3 * (1 + 1.5 * h) * NOISE, rtol=1e-5)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_where_and_how_often_the_network_is_evaluated(name):
    """Each row of the batch at the same level; not once more than the solver says."""
    seen = []

    def field(z, t):
        jax.debug.callback(lambda t: seen.append(np.array(t).ravel()), t, ordered=True)
        return jnp.zeros_like(z)

    solve(name, field, NOISE, LEVELS, draw=lambda number: jnp.zeros_like(NOISE))
    jax.effects_barrier()
    times = np.array(seen)
    evaluations = solvers.SOLVERS[name].evaluations
    assert times.shape == (4 * evaluations, 2) and (times[:, 0] == times[:, 1]).all()
    np.testing.assert_allclose(times[::evaluations, 0], LEVELS[:-1], rtol=1e-6)
    if name == "midpoint":
        np.testing.assert_allclose(times[1::2, 0], [0.85, 0.5, 0.175, 0.025], rtol=1e-6)
    if name == "heun":  # never at 0, where a network that predicts the data has no velocity
        np.testing.assert_allclose(times[1::2, 0], [0.7, 0.3, 0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_all_arrive_where_the_data_are_one_point(name, steps):
    """All noise flows to x0 in straight lines, v = (z - x0) / t: any number of steps arrives."""
    x0 = np.random.default_rng(1).standard_normal(NOISE.shape[1:]).astype(np.float32)
    levels = time.sampling_sigmas(steps, 1000, 3.0)
    z = solve(name, lambda z, t: (z - x0) / t, NOISE, levels, draw=lambda number: NOISE)
    np.testing.assert_allclose(z, np.broadcast_to(x0, z.shape), atol=2e-5)


def test_the_ancestral_sampler_keeps_the_spread_of_the_data():
    """Every step is affine on Gaussian data: mean and variance of all noises together are known.

    Both come to those of the data with the first power of the step.
    """

    def moments(count):
        levels = np.linspace(1, 0, count + 1)
        rows = solvers.plan("ancestral", levels)
        mean, variance = 0.0, 1.0
        ends = np.array([[0.0], [1.0]], np.float32)  # of z, to read off the affine map
        for i in range(count):
            row = {key: value[i] for key, value in rows.items()}
            state, draw = solvers.start("ancestral", jnp.asarray(ends)), jnp.zeros_like
            after = solvers.step(
                "ancestral",
                state,
                row,
                lambda z, t_B, row, guide: (gaussian(z, t_B[:, None]), guide),
                lambda number, z=ends, draw=draw: draw(z),
            ).z
            slope = float(after[1, 0] - after[0, 0])
            mean = float(after[0, 0]) + slope * mean
            variance = slope**2 * variance + float(row["noise"]) ** 2
        return np.abs([mean - MEAN, variance - SPREAD**2])

    few, many = moments(40), moments(160)
    assert (few[1] / many[1]) == pytest.approx(4, rel=0.2) and many[1] < 0.02
    assert many[0] < 1e-4


def test_the_ancestral_sampler_draws_once_a_step():
    """A step from pure noise keeps nothing of it: (1 - t) x + t n."""
    fresh = np.random.default_rng(2).standard_normal((3, *NOISE.shape)).astype(np.float32)

    def draw(number):
        return jnp.asarray(fresh)[number]

    z = solve("ancestral", lambda z, t: z / t, NOISE, [1.0, 0.8], draw=draw)  # x = 0
    np.testing.assert_allclose(z, 0.8 * fresh[0], rtol=1e-6)
    z = solve("ancestral", lambda z, t: z / t, NOISE, [1.0, 0.8, 0.5], draw=draw)
    kept = 0.5 * 0.2 / (0.8 * 0.5)
    expected = 0.5 * (kept * fresh[0] + np.sqrt(1 - kept**2) * fresh[1])
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)


def test_dpmpp_2m_by_hand():
    """Two inner steps, by the paper's algorithm: D = (1 + 1 / 2r) x_i - x_{i-1} / 2r."""
    levels = [0.9, 0.6, 0.2]
    lam = [np.log((1 - t) / t) for t in levels]
    h0, h1 = np.diff(lam)

    def data(z, t):
        return z - t * gaussian(z, t)

    x0 = data(NOISE, 0.9)
    z = 0.6 / 0.9 * NOISE - 0.4 * np.expm1(-h0) * x0
    ratio = h0 / h1
    mixed = (1 + 0.5 / ratio) * data(z, 0.6) - 0.5 / ratio * x0
    z = 0.2 / 0.6 * z - 0.8 * np.expm1(-h1) * mixed
    np.testing.assert_allclose(solve("dpmpp_2m", gaussian, NOISE, levels), z, rtol=1e-5, atol=1e-6)


def test_what_is_no_schedule_or_no_solver_is_refused():
    for levels in ([1.0], [0.5, 0.5], [0.2, 0.4], [1.2, 0.0], [0.5, -0.1]):
        with pytest.raises(ValueError, match="Levels must fall"):
            solvers.plan("euler", levels)
    with pytest.raises(ConfigError, match="Did you mean 'dpmpp_2m'"):
        solvers.find("dpmpp2m")
    with pytest.raises(ConfigError, match="known: euler, heun, midpoint, dpmpp_2m, unipc, ances"):
        solvers.find("x")
