"""One step of training: read the text once, draw noise and times, fit the velocity, update.

The text memory is made outside of what is differentiated: no backward pass through the LLM, no
rematerialisation of it. Randomness is a function of (seed, step): one key a draw, drawn for the
whole global batch, so that any number of devices or microbatches sees the same numbers.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2i_jax.diffusion import flow, time
from t2i_jax.models.autoencoder import Moments
from t2i_jax.models.clip import CLIPText
from t2i_jax.models.fusion import TextToImageModel, variables
from t2i_jax.sharding import constrain
from t2i_jax.training.state import TrainState, update_ema

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training loss of a model. `autoencoder.encode(params, images, key)` gives latents."""

    model: TextToImageModel
    autoencoder: Any
    num_timesteps: int
    shift: float
    time_mean: float
    time_std: float
    clip: CLIPText | None = None

    def prepare(self, frozen: Any, batch: Any, key: jax.Array) -> Any:
        """Everything that has no gradient: latents, noise, times and what the LLM read.

        `batch` is {'image': uint8 (B, H, W, 3), 'ids': (B, T), 'mask': (B, T)}, and with CLIP
        'clip_ids': (B, 77). Instead of the image it may have 'moments' (B, H', W', 2 C), means and
        log-variances of the latents: float32 (`make_encode`), or uint16, the bits of bfloat16.
        """
        key_latent, key_noise, key_time = (jax.random.fold_in(key, i) for i in range(3))
        z = self.latents(frozen, batch, key_latent)
        t_B = time.sample_times(
            key_time,
            z.shape[0],
            num_timesteps=self.num_timesteps,
            shift=self.shift,
            mean=self.time_mean,
            std=self.time_std,
        )
        noise = jax.random.normal(key_noise, z.shape, jnp.float32)
        return {
            "latents": jax.lax.stop_gradient(z),
            "noise": constrain(noise, "batch", *(None,) * (noise.ndim - 1)),
            "t": constrain(t_B, "batch"),
            "features": self.read_text(frozen, batch),
            "pooled": self.pool_text(frozen, batch),
        }

    def latents(self, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        """A draw of the latents of a batch (B, H', W', C), float32."""
        if "moments" in batch:
            moments = batch["moments"]
            if moments.dtype == jnp.uint16:
                moments = jax.lax.bitcast_convert_type(moments, jnp.bfloat16)
            mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
            return self.autoencoder.scaled(Moments(mean, logvar).sample(key))
        images = _to_unit(batch["image"])
        return self.autoencoder.encode(frozen.get("autoencoder", {}), images, key)

    def read_text(self, frozen: Any, batch: Any) -> Any:
        """TextFeatures of a batch, cut off from differentiation."""
        features = self.model.apply(
            {"params": {"llm": frozen["llm"]}}, batch["ids"], batch["mask"], method="read_text"
        )
        return jax.lax.stop_gradient(features)

    def pool_text(self, frozen: Any, batch: Any) -> jax.Array | None:
        """CLIP's embedding of a batch (B, P), cut off from differentiation; None without CLIP."""
        if self.clip is None:
            return None
        pooled_BP = self.clip.apply({"params": frozen["clip"]}, batch["clip_ids"])
        return jax.lax.stop_gradient(pooled_BP)

    def loss_B(self, params: Any, inputs: Any, frozen: Any = None) -> jax.Array:
        """Mean squared error of the velocity, row by row: (B,) float32.

        `frozen` is needed where `params` are low-rank factors.
        """
        z, noise, t_B = inputs["latents"], inputs["noise"], inputs["t"]
        apply = functools.partial(self.model.apply, variables(self.model, params, frozen))
        memory = apply(inputs["features"], inputs.get("pooled"), method="remember")
        prediction = apply(flow.interpolate(z, noise, t_B), t_B, memory, method="denoise")
        return flow.mse_B(prediction, flow.velocity(z, noise))


def make_encode(autoencoder: Any, accumulation: int = 1) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure function (params, uint8 images (B, H, W, 3)) -> 'moments' of a batch, float32.

    In as many parts, one after the other, as a step has microbatches.
    """

    def encode(params, images):
        moments = autoencoder.posterior(params, _to_unit(images))
        return jnp.concatenate([moments.mean, moments.logvar], axis=-1)

    def encode_in_parts(params, images):
        count = len(images)
        if accumulation == 1 or count % accumulation:
            return encode(params, images)
        parts = jax.lax.map(lambda x: encode(params, x), split_batch(images, accumulation))
        return jnp.moveaxis(parts, 0, 1).reshape(count, *parts.shape[2:])

    return encode_in_parts


def _to_unit(images: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def split_batch(inputs: Any, parts: int) -> Any:
    """(B, ...) leaves -> (parts, B / parts, ...), every part taking rows from every shard."""

    def one(path, x):
        axis = 1 if _stacked(path) else 0  # keys and values have their layers first
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    return jax.tree_util.tree_map_with_path(one, inputs)


def _stacked(path) -> bool:
    return bool(path) and getattr(path[-1], "name", "").startswith(("keys_L", "values_L"))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    accumulation: int = 1,
    ema: Mapping[str, Any],
    block_norms: bool = False,
) -> Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, Metrics]]:
    """The pure function (state, frozen, batch, rng) -> (state, metrics); to be jitted once.

    `ema` is the config's section. `rng` is the run's key, the same at every step. Metrics are
    float32 scalars: loss, grad_norm (before clipping), param_norm, update_norm, learning_rate; with
    `block_norms` these norms of every block of the DiT, 'grad_norm/block' (layers,) and so on; and
    where the batch has it, 'bad': the samples that it could not use, by cause, int32 (causes,),
    and 'stop': whether a process was asked to, int32.
    """

    def gradient(params, inputs, frozen):
        return jax.value_and_grad(lambda p: jnp.mean(objective.loss_B(p, inputs, frozen)))(params)

    def accumulated(params, inputs, frozen):
        if accumulation == 1:
            return gradient(params, inputs, frozen)

        def add(total, part):
            return jax.tree.map(
                lambda a, b: a + b / accumulation, total, gradient(params, part, frozen)
            ), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        return jax.lax.scan(add, zero, split_batch(inputs, accumulation))[0]

    def train_step(state: TrainState, frozen, batch, rng) -> tuple[TrainState, Metrics]:
        inputs = objective.prepare(frozen, batch, jax.random.fold_in(rng, state.step))
        loss, grads = accumulated(state.params, inputs, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        averaged = update_ema(state.ema, params, step, **ema)
        trees = {"grad_norm": grads, "param_norm": params, "update_norm": updates}
        metrics = {
            "loss": loss,
            **{name: optax.tree.norm(tree) for name, tree in trees.items()},
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        if block_norms:
            metrics |= {f"{name}/block": norms_L(tree) for name, tree in trees.items()}
        if "bad" in batch:
            metrics["bad"] = jnp.sum(batch["bad"], axis=0)
        if "stop" in batch:
            metrics["stop"] = jnp.max(batch["stop"])
        return TrainState(step, params, averaged, opt_state), metrics

    return train_step


def norms_L(params: Any) -> jax.Array:
    """The norm of each of the DiT's blocks, which are stacked along the first axis: (L,)."""
    leaves = jax.tree.leaves(params["dit"]["blocks"])
    return jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=range(1, x.ndim)) for x in leaves))


def make_validation(objective: Objective, timesteps: tuple[float, ...]) -> Callable:
    """The pure function (params, frozen, batch, rng) -> loss (len(timesteps),) at fixed times."""

    def validate(params, frozen, batch, rng):
        inputs = objective.prepare(frozen, batch, rng)

        def at(t):
            t_B = jnp.full(inputs["t"].shape, t)
            return jnp.mean(objective.loss_B(params, {**inputs, "t": t_B}, frozen))

        return jax.lax.map(at, jnp.asarray(timesteps, jnp.float32))

    return validate
