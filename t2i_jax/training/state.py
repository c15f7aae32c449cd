"""What training changes: parameters, their average, the optimiser's state and the step."""

import enum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


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


def update_ema(ema: Any, params: Any, step: jax.Array, *, decay: float, every: int) -> Any:
    """decay * ema + (1 - decay) * params where `every` divides step, else ema; float32."""

    def average():
        return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)

    return average() if every == 1 else jax.lax.cond(step % every == 0, average, lambda: ema)
