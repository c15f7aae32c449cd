"""The programs of a run: what is compiled, for which arrays, and where these live.

The autoencoder is a program of its own: its convolutions take a compiler longer than all the rest,
and they do not change when the model does.

Nothing here touches a device, so the same programs can be compiled for a machine that is not there
(speed/compile.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, sharding
from t2i_jax.models.autoencoder import Autoencoder, Identity
from t2i_jax.training import optimizer, state, step


class Program(NamedTuple):
    """Jitted functions; to be called, or lowered, while the mesh is set."""

    encode: Any  # (autoencoder's params, images) -> moments; None where latents are pixels
    state: state.TrainState  # abstract, with its shardings
    create: Any  # trained parameters -> the state before the first step
    train_step: Any  # (state, frozen, batch, key) -> (state, metrics); donates the state
    validate: Any  # (params, frozen, batch, key) -> loss (len(validation.timesteps),)

    def encoded(self, frozen: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as steps and validation take it: with the moments of its images."""
        if self.encode is None or "image" not in batch:
            return batch
        rest = {name: x for name, x in batch.items() if name != "image"}
        return rest | {"moments": self.encode(frozen["autoencoder"], batch["image"])}


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
    pixels = isinstance(autoencoder.net, Identity)
    encode = step.make_encode(autoencoder, config.train.accumulation)
    return Program(
        None if pixels else jax.jit(encode, out_shardings=sharding.batch_sharding(mesh)),
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


def abstract_batch(
    config: ConfigDict, mesh: Mesh, *, latents: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of square images, or of stored `latents`, as a loader makes it."""
    count, place = config.train.batch_size, sharding.batch_sharding(mesh)
    height, width, channels = build.latent_shape(config)
    side = config.data.image_size
    if latents:
        name, shape, dtype = "moments", (height, width, 2 * channels), jnp.uint16
    else:
        name, shape, dtype = "image", (side, side, 3), jnp.uint8
    picture = jax.ShapeDtypeStruct((count, *shape), dtype, sharding=place)
    return {**build.abstract_text(config, count, place), name: picture}


def abstract_encoded(programs: Program, frozen: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What `Program.encoded` gives of an abstract batch; while the mesh is set."""
    place = batch["ids"].sharding
    encoded = jax.eval_shape(programs.encoded, frozen, batch)
    return {name: _placed(x, place) for name, x in encoded.items()}


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
