"""The program that draws: token ids to images, as one compiled function.

Text memories, the loop over steps, and the autoencoder's decoding are in it, so that the host says
one thing per batch and nothing but images comes back. Nothing here touches a device: the same
program can be compiled for a machine that is not there (speed/compile.py).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, sharding
from t2i_jax.diffusion import sampling
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.models.clip import CLIPText
from t2i_jax.models.fusion import TextToImageModel, variables
from t2i_jax.models.memory import TextMemory, interleave, repeat


class Sampler(NamedTuple):
    """What a program is compiled for, beside shapes."""

    model: TextToImageModel
    autoencoder: Autoencoder
    clip: CLIPText | None
    latent_shape: tuple[int, int, int]  # height, width, channels
    guided: bool  # False: conditional alone, the null prompt is not evaluated


def make(config: ConfigDict, autoencoder: Autoencoder, *, guided: bool = True) -> Sampler:
    """The sampler of `config`, for images of its size."""
    shape = build.latent_shape(config)
    return Sampler(build.model(config), autoencoder, build.clip(config), shape, guided)


@functools.partial(jax.jit, static_argnums=0)
def draw(
    sampler: Sampler,
    weights: dict[str, Any],
    text: dict[str, jax.Array],
    null: dict[str, jax.Array],
    index_B: jax.Array,
    key: jax.Array,
    sigmas: jax.Array,
    guidance: jax.Array,
) -> jax.Array:
    """uint8 images (B, H, W, 3).

    Args:
      sampler: static.
      weights: {'params': trained, 'frozen': {'llm', 'autoencoder', 'clip' if used}}; with
        low-rank factors, which are trained, 'base' is among the frozen.
      text: 'ids' and 'mask' (B, T), 'clip_ids' where CLIP is used, of the prompts.
      null: the same of the null prompt, of one row.
      index_B: numbers of the images; the noise of one depends on `key` and its number alone.
      sigmas: noise levels (S + 1,), from 1 to 0.
      guidance: scale; not used where the sampler is not guided.
    """
    model, fixed = sampler.model, weights["frozen"]
    trained = variables(model, weights["params"], fixed)

    def encode_text(text) -> TextMemory:
        llm = {"params": {"llm": fixed["llm"]}}
        features = model.apply(llm, text["ids"], text["mask"], method="read_text")
        pooled = None
        if sampler.clip is not None:
            pooled = sampler.clip.apply({"params": fixed["clip"]}, text["clip_ids"])
        return model.apply(trained, features, pooled, method="remember")

    def denoise(z, t_B, memory):
        return model.apply(trained, z, t_B, memory, method="denoise")

    memory = encode_text(text)
    null_memory = repeat(encode_text(null), len(index_B))
    scale = guidance if sampler.guided else 1
    velocity = sampling.guided(denoise, memory, null_memory, scale, interleave)
    shape = sampler.latent_shape
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)
    noise = sharding.constrain(noise, "batch", None, None, None)
    z = sampling.euler(velocity, noise, sigmas)
    images = sampler.autoencoder.decode(fixed["autoencoder"], z)
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def abstract_params(config: ConfigDict, mesh: Mesh, *, master: bool = False) -> Any:
    """Trained parameters as they are held for drawing: matrices in the dtype of the computation.

    With `master`, as a checkpoint has them: float32.
    """
    boxed, _ = build.abstract_params(config)
    return build.sharded(boxed if master else build.as_used(boxed), mesh)


def abstract_arguments(config: ConfigDict, mesh: Mesh, batch: int, steps: int) -> dict[str, Any]:
    """The arguments of `draw` behind the first, by name, without values."""

    def placed(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    everywhere = sharding.replicated(mesh)
    fixed = build.abstract_frozen(config, mesh)
    return {
        "weights": {"params": abstract_params(config, mesh), "frozen": fixed},
        "text": build.abstract_text(config, batch, sharding.batch_sharding(mesh)),
        "null": build.abstract_text(config, 1, everywhere),
        "index_B": placed((batch,), jnp.int32),
        "key": build.abstract_key(mesh),
        "sigmas": placed((steps + 1,), jnp.float32),
        "guidance": placed((), jnp.float32),
    }
