"""What training changes: parameters, their average, the optimiser's state and the step."""

import enum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from t2i_jax import sharding


class Stream(enum.IntEnum):
    """What the run's key is folded with, one stream of randomness each."""

    INIT = 0
    LLM = 1
    TRAIN = 2
    VALIDATION = 3


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` optimiser steps; trained parameters only, in float32.

    Attributes:
      step: int32 scalar.
      params: master weights.
      ema: exponential moving average of params.
      opt_state: of the optimiser.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def update_ema(
    ema: Any, params: Any, step: jax.Array, *, decay: float, every: int, warmup: bool
) -> Any:
    """decay * ema + (1 - decay) * params where `every` divides step, else ema; float32.

    With `warmup` the n-th update decays by min(decay, (1 + n) / (10 + n)) only, so that a short run
    forgets its initial weights.
    """

    def average():
        n = (step // every).astype(jnp.float32)
        d = jnp.minimum(decay, (1.0 + n) / (10.0 + n)) if warmup else decay
        return jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)

    return average() if every == 1 else jax.lax.cond(step % every == 0, average, lambda: ema)


def shardings(whole: TrainState, trained: Any, mesh: Mesh) -> TrainState:
    """Where the arrays of an (abstract) state live; `trained` are its sharded abstract parameters.

    Parameters and EMA as these; what of the optimiser's state is like a parameter, as that one.
    """
    params = jax.tree.map(lambda x: x.sharding, trained)
    return TrainState(
        step=sharding.replicated(mesh),
        params=params,
        ema=params,
        opt_state=sharding.like(whole.opt_state, trained, params, mesh),
    )
