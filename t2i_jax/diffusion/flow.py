"""Rectified flow: the path between data and noise, its velocity, and the loss.

Derivation (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747). Join a sample x and
Gaussian noise n by the straight line

    z_t = (1 - t) x + t n,        t in [0, 1],  0 = data,  1 = noise.

Along one line dz/dt = n - x, which a network cannot know from z_t alone; the least-squares fit

    v(z, t) = argmin E || v(z_t, t) - (n - x) ||^2  =  E[ n - x | z_t = z ]

is the velocity of a flow whose marginals are those of z_t. Integrating dz/dt = v(z, t) from t = 1
to t = 0 therefore turns noise into samples of the data.
"""

import chex
import jax
import jax.numpy as jnp


def interpolate(x: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """z_t = (1 - t) x + t n, one t for each row of the batch."""
    chex.assert_equal_shape([x, noise])
    t = _column(t_B, x.ndim)
    return (1.0 - t) * x + t * noise


def velocity(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The regression target, n - x."""
    return noise - x


def mse_B(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of each row, in float32: (B, ...) -> (B,)."""
    chex.assert_equal_shape([prediction, target])
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(error).reshape(error.shape[0], -1), axis=-1)


def _column(t_B: jax.Array, ndim: int) -> jax.Array:
    return t_B.reshape(-1, *(1,) * (ndim - 1))
