"""The average of the weights against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2i_jax.training import state


def averages(steps, **ema):
    """After each step, with parameters 1, 2, 3, ... and an average that starts at 0."""
    update = jax.jit(lambda e, p, s: state.update_ema(e, p, s, **ema))
    out, average = [], {"w": jnp.zeros(2)}
    for i in range(1, steps + 1):
        average = update(average, {"w": jnp.full(2, float(i))}, jnp.int32(i))
        out.append(float(average["w"][0]))
    return np.array(out)


def test_the_average_is_a_geometric_sum():
    n = 12
    sums = [sum(0.1 * 0.9 ** (i - j) * j for j in range(1, i + 1)) for i in range(1, n + 1)]
    np.testing.assert_allclose(averages(n, decay=0.9, every=1, warmup=False), sums, rtol=1e-5)


def test_between_updates_it_stands_still():
    actual = averages(8, decay=0.5, every=3, warmup=False)
    np.testing.assert_allclose(actual, [0, 0, 1.5, 1.5, 1.5, 3.75, 3.75, 3.75])


def test_warming_up_it_forgets_the_start():
    """The n-th update decays by (1 + n) / (10 + n) until that is the decay asked for: here 6/15."""
    decays = [2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4, 0.4]
    expected, average = [], 0.0
    for i, decay in enumerate(decays, 1):
        average = decay * average + (1 - decay) * i
        expected.append(average)
    np.testing.assert_allclose(averages(7, decay=0.4, every=1, warmup=True), expected, rtol=1e-6)
    every_other = averages(4, decay=0.4, every=2, warmup=True)
    second = 3 / 12 * (9 / 11 * 2) + 9 / 12 * 4
    np.testing.assert_allclose(every_other, [0, 9 / 11 * 2, 9 / 11 * 2, second], rtol=1e-6)


def test_a_new_state_averages_a_copy_of_its_parameters():
    """Else a step that donates the state would give one buffer away twice."""
    params = {"w": jnp.arange(3.0)}
    new = state.create(params, optax.adam(1.0))
    assert new.step == 0 and new.step.dtype == jnp.int32
    np.testing.assert_array_equal(new.ema["w"], params["w"])
    assert new.ema["w"].unsafe_buffer_pointer() != new.params["w"].unsafe_buffer_pointer()
