"""The programs of a run: what is compiled, for which arrays, and where these live.

Nothing here touches a device, so the same programs can be compiled for a machine that is not there
(speed/compile.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, sharding
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.training import optimizer, state, step


class Program(NamedTuple):
    """Jitted functions; to be called, or lowered, while the mesh is set."""

    state: state.TrainState  # abstract, with its shardings
    create: Any  # trained parameters -> the state before the first step
    train_step: Any  # (state, frozen, batch, key) -> (state, metrics); donates the state
    validate: Any  # (params, frozen, batch, key) -> loss (len(validation.timesteps),)


def make(config: ConfigDict, mesh: Mesh, autoencoder: Autoencoder) -> Program:
    """The programs of `config`. Metrics and validation losses are readable on every host."""
    whole, update, rate = abstract_state(config, mesh)
    places, everywhere = jax.tree.map(lambda x: x.sharding, whole), sharding.replicated(mesh)
    model = build.model(config)
    objective = step.Objective(model, autoencoder, **config.flow, clip=build.clip(config))
    train_step = step.make_train_step(
        objective,
        update,
        rate,
        accumulation=config.train.accumulation,
        ema=config.ema,
        block_norms=config.train.block_norms,
    )
    validate = step.make_validation(objective, tuple(config.validation.timesteps))
    return Program(
        whole,
        jax.jit(lambda params: state.create(params, update), out_shardings=places),
        jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere)),
        jax.jit(validate, out_shardings=everywhere),
    )


def abstract_state(config: ConfigDict, mesh: Mesh) -> tuple[state.TrainState, Any, Any]:
    """(the state with its shardings, the optimiser, its learning rate by step)."""
    boxed, _ = build.abstract_params(config)
    trained = build.sharded(boxed, mesh)
    update, rate = optimizer.make(config.optimizer, config.train.steps, boxed)
    whole = jax.eval_shape(lambda p: state.create(p, update), trained)
    places = state.shardings(whole, trained, mesh)
    return jax.tree.map(_placed, whole, places), update, rate


def abstract_frozen(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What is not trained, as `frozen.load` gives it: the autoencoder replicated."""
    _, boxed = build.abstract_params(config)
    return {name: build.sharded(part, mesh) for name, part in boxed.items()}


def abstract_batch(config: ConfigDict, mesh: Mesh, *, latents: bool = False) -> dict[str, Any]:
    """A global batch of square images, or of stored `latents`."""
    count, length = config.train.batch_size, config.data.max_text_tokens
    height, width, channels = build.latent_shape(config)
    side = config.data.image_size
    arrays = {"ids": ((length,), jnp.int32), "mask": ((length,), jnp.bool_)}
    if latents:
        arrays["moments"] = (height, width, 2 * channels), jnp.uint16
    else:
        arrays["image"] = (side, side, 3), jnp.uint8
    if config.dit.pooled_width:
        arrays["clip_ids"] = (config.clip.max_tokens,), jnp.int32
    place = sharding.batch_sharding(mesh)
    return {
        name: _placed(jax.ShapeDtypeStruct((count, *shape), dtype), place)
        for name, (shape, dtype) in arrays.items()
    }


def abstract_key(mesh: Mesh) -> Any:
    """A key, everywhere."""
    return _placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
