"""Guidance: how the velocities with and without the prompt become the one that is followed.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) extrapolates from the velocity without
the prompt, v_null, to the one with it, v, by a scale g:

    v_null + g (v - v_null),

which is v at g = 1. Large scales oversaturate; each further method mends that in its own way, and
all are v at g = 1. Whatever the method, guidance may be
limited to an interval of noise levels (Kynkäänniemi et al., arXiv 2404.07724): where it is strong
it costs diversity, and at low noise it changes nothing. Outside, only v is evaluated.

The text memories of both prompts do not depend on z or t and are made before the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.solvers import Rows, Velocity

_TINY = 1e-12


class Pair(NamedTuple):
    """Both velocities, and where they are from."""

    v: jax.Array
    null: jax.Array
    row: Rows
    z: jax.Array
    t_B: jax.Array
    state: Any


class Guidance(NamedTuple):
    """What is compiled into a sampler; the scale is not."""

    method: str = "plain"  # of METHODS
    interval: tuple[float, float] = (0.0, 1.0)  # steps from levels low < t <= high are guided
    rescale: float = 0.7  # 'rescaled': share of the rescaled velocity, 0 to 1
    parallel: float = 0.0  # 'apg': what is left of the change along the prediction
    norm: float = 0.0  # 'apg': largest norm of the change of an image; 0 = any
    momentum: float = -0.5  # 'apg': share of the earlier changes in the next one
    zero_steps: int = 1  # 'cfg-zero': first steps that are not taken: nothing moves in them

    @property
    def limited(self) -> bool:
        """Whether there are levels that it leaves alone."""
        return tuple(self.interval) != (0.0, 1.0)

    def told(self) -> dict[str, Any]:
        """The method with the numbers that it reads, and the interval where there is one."""
        read = {"rescaled": ("rescale",), "apg": ("parallel", "norm", "momentum")}
        read["cfg-zero"] = ("zero_steps",)
        found = {"method": self.method} | {k: getattr(self, k) for k in read.get(self.method, ())}
        return found | ({"interval": list(self.interval)} if self.limited else {})

    def rows(self, scale: float, levels: Sequence[float]) -> Rows:
        """What is added to a solver's table for levels (S + 1,): the scale of each step."""
        t, (low, high) = np.asarray(levels, np.float32)[:-1], self.interval
        return {"scale": np.where((low < t) & (t <= high), np.float32(scale), np.float32(1))}


def plain(v: jax.Array, null: jax.Array, scale: jax.Array) -> jax.Array:
    """v_null + scale (v - v_null)."""
    return null + scale * (v - null)


def rescaled(v: jax.Array, null: jax.Array, scale: jax.Array, share: float) -> jax.Array:
    """Each image brought back to the deviation of v, by `share` (Lin et al., arXiv 2305.08891).

    Their equations 15 and 16, on the velocity.
    """
    guided = plain(v, null, scale)
    same = guided * (_deviation(v) / jnp.maximum(_deviation(guided), _TINY))
    return share * same + (1.0 - share) * guided


def zero_star(v: jax.Array, null: jax.Array, scale: jax.Array) -> jax.Array:
    """Plain guidance from s v_null, s = <v, v_null> / |v_null|^2 (Fan et al., arXiv 2503.18886).

    s v_null is the multiple of v_null that is nearest to v, image by image. The method's first
    steps, in which the velocity is taken for zero, are left out of the table of steps: latents
    are then, for every solver, at a later level what they were at the first.
    """
    s = _inner(v, null) / jnp.maximum(_inner(null, null), _TINY)
    return plain(v, s * null, scale)


def projected(pair: Pair, how: Guidance) -> tuple[jax.Array, jax.Array]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416): (velocity, next average).

    In terms of the data x = z - t v. The change d = x - x_null is added up with momentum, cut to a
    norm, and split along x and across; what lies along x saturates colours and is scaled down:
    x + (scale - 1) (d_across + parallel d_along). The pair's state is the sum so far.
    """
    v, z, scale = pair.v, pair.z, pair.row["scale"]
    t = pair.t_B.reshape(-1, *(1,) * (z.ndim - 1))
    x = z - t * v
    change = average = t * (pair.null - v) + how.momentum * pair.state
    if how.norm:
        size = jnp.sqrt(_inner(change, change))
        change = change * jnp.minimum(1.0, how.norm / jnp.maximum(size, _TINY))
    along = _inner(change, x) / jnp.maximum(_inner(x, x), _TINY) * x
    moved = (scale - 1.0) * (change - (1.0 - how.parallel) * along)
    return v - moved / t, average


def guided(
    denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
    memory: Any,
    null_memory: Any,
    how: Guidance,
    join: Callable[[Any, Any], Any],
) -> Velocity:
    """The guided velocity of `denoise(z, t_B, memory)`; both prompts in one batch, row by row.

    `join(null_memory, memory)` has rows of the two by turns along the batch. The rows of the
    solver's table must have those of `how.rows`, its first state must hold `first(how, z)`.
    """
    both = join(null_memory, memory)

    def extrapolated(z, t_B, row, state):
        v = denoise(jnp.repeat(z, 2, axis=0), jnp.repeat(t_B, 2), both)
        v = v.reshape(-1, 2, *v.shape[1:])
        return METHODS[how.method](Pair(v[:, 1], v[:, 0], row, z, t_B, state), how)

    def alone(z, t_B, row, state):
        del row
        return denoise(z, t_B, memory), state

    if not how.limited:
        return extrapolated
    return lambda *args: jax.lax.cond(args[2]["scale"] == 1, alone, extrapolated, *args)


METHODS: dict[str, Callable[[Pair, Guidance], tuple[jax.Array, Any]]] = {
    "plain": lambda p, how: (plain(p.v, p.null, p.row["scale"]), p.state),
    "rescaled": lambda p, how: (rescaled(p.v, p.null, p.row["scale"], how.rescale), p.state),
    "apg": projected,
    "cfg-zero": lambda p, how: (zero_star(p.v, p.null, p.row["scale"]), p.state),
}


def conditional(denoise: Callable[[jax.Array, jax.Array, Any], jax.Array], memory: Any) -> Velocity:
    """The velocity with the prompt; the null prompt is never evaluated."""
    return lambda z, t_B, row, state: (denoise(z, t_B, memory), state)


def first(how: Guidance | None, z: jax.Array) -> Any:
    """What guidance carries before the first step, for latents z."""
    return jnp.zeros_like(z) if how is not None and how.method == "apg" else ()


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product of each image: (B, ...) -> (B, 1, ...)."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _deviation(x: jax.Array) -> jax.Array:
    """Standard deviation of each image: (B, ...) -> (B, 1, ...)."""
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
