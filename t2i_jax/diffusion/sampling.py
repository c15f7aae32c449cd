"""Solving the flow from noise to data, guided.

Euler's method on dz/dt = v(z, t) over the levels t_0 = 1 > t_1 > ... > t_S = 0:

    z_{i+1} = z_i + (t_{i+1} - t_i) v(z_i, t_i)

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) replaces v by an extrapolation from the
velocity without the prompt to the one with it,

    v = v_null + g (v_prompt - v_null),

which is v_prompt at g = 1. The text memories of prompt and null prompt do not depend on z or t and
are made before the loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (z, t_B) -> v


def guide(conditional: jax.Array, unconditional: jax.Array, scale) -> jax.Array:
    """v_null + scale (v_prompt - v_null)."""
    return unconditional + scale * (conditional - unconditional)


def guided(denoise: Callable, memory, null_memory, scale, join: Callable) -> Velocity:
    """The guided velocity from `denoise(z, t_B, memory)`; both prompts in one batch, row by row.

    `join(null_memory, memory)` has rows of the two by turns along the batch. At scale 1 (a Python
    number) the null prompt is not evaluated at all.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda z, t_B: denoise(z, t_B, memory)
    both = join(null_memory, memory)

    def velocity(z, t_B):
        v = denoise(jnp.repeat(z, 2, axis=0), jnp.repeat(t_B, 2), both)
        v = v.reshape(-1, 2, *v.shape[1:])
        return guide(v[:, 1], v[:, 0], scale)

    return velocity


def euler(velocity: Velocity, noise: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Integrates from sigmas[0] to sigmas[-1], as one `lax.scan`: (B, ...) -> (B, ...)."""

    def step(z, level):
        t, t_next = level
        v = velocity(z, jnp.full(z.shape[:1], t))
        return z + (t_next - t) * v, None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    z, _ = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    return z
