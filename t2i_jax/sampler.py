"""The program that draws: token ids to images, as one compiled function.

Text memories, the loop over steps, and the autoencoder's decoding are in it, so that the host says
one thing per batch and nothing but images comes back. Where somebody wants to look at every step,
the same parts are three functions: `prepare`, `advance`, `finish`. Nothing here touches a device:
the same program can be compiled for a machine that is not there (speed/compile.py).
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, sharding
from t2i_jax.diffusion import flow, guidance, solvers
from t2i_jax.diffusion.guidance import Guidance
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.models.clip import CLIPText
from t2i_jax.models.fusion import TextToImageModel, variables
from t2i_jax.models.memory import TextMemory, interleave, repeat
from t2i_jax.options import Options

Weights = dict[str, Any]  # {'params': trained, 'frozen': {'llm', 'autoencoder', 'clip' if used}}
Text = dict[str, jax.Array]  # 'ids' and 'mask' (B, T), 'clip_ids' where CLIP is used


class Sampler(NamedTuple):
    """What a program is compiled for, beside shapes."""

    model: TextToImageModel
    autoencoder: Autoencoder
    clip: CLIPText | None
    latent_shape: tuple[int, int, int]  # height, width, channels
    solver: str  # of solvers.SOLVERS
    guidance: Guidance | None  # None: conditional alone, the null prompt is not evaluated
    decodes: bool = True  # False: latents come back


class Start(NamedTuple):
    """What drawing starts from, all on devices; with neither of the two last, from pure noise.

    Attributes:
      key: of the randomness; that of an image depends on it and the image's number alone.
      number_B: numbers of the images.
      level: of noise, at the start.
      latents_BHWC: given latents at the first level.
      image_BHWC: latents of images, to which noise of the first level is added.
    """

    key: jax.Array
    number_B: jax.Array
    level: jax.Array
    latents_BHWC: jax.Array | None = None
    image_BHWC: jax.Array | None = None


def make(
    config: ConfigDict, autoencoder: Autoencoder, options: Options, *, decodes: bool = True
) -> Sampler:
    """The sampler of `config` for images drawn by `options`."""
    _, _, channels = build.latent_shape(config)
    sides = (side // autoencoder.downsample for side in (options.height, options.width))
    return Sampler(
        build.model(config),
        autoencoder,
        build.clip(config),
        (*sides, channels),
        options.solver,
        options.guidance,
        decodes,
    )


def table(options: Options) -> solvers.Rows:
    """The rows of all steps, on the host."""
    rows = solvers.plan(options.solver, options.levels)
    if options.guidance is None:
        return rows
    return rows | options.guidance.rows(options.scale, options.levels)


@functools.partial(jax.jit, static_argnums=0)
def draw(
    sampler: Sampler,
    weights: Weights,
    text: Text,
    null: Text,
    start: Start,
    rows: solvers.Rows,
) -> jax.Array:
    """uint8 images (B, H, W, 3), or latents (B, H', W', C) where the sampler does not decode.

    Args:
      sampler: static.
      weights: with low-rank factors, which are trained, 'base' is among the frozen.
      text: of the prompts.
      null: of what guidance leads away from, one row for all images or a row for each.
      start: what the first level holds.
      rows: of `table`.
    """
    memories = _memories(sampler, weights, text, null, len(start.number_B))
    state = _first(sampler, start)
    z = solvers.solve(
        sampler.solver,
        _velocity(sampler, weights, memories),
        state.z,
        rows,
        state.guide,
        _fresh(sampler, start),
    )
    return _decode(sampler, weights, z)


@functools.partial(jax.jit, static_argnums=0)
def prepare(
    sampler: Sampler, weights: Weights, text: Text, null: Text, start: Start
) -> tuple[Any, solvers.State]:
    """What `advance` needs: the memories of the texts, and the first state."""
    memories = _memories(sampler, weights, text, null, len(start.number_B))
    return memories, _first(sampler, start)


@functools.partial(jax.jit, static_argnums=0)
def advance(
    sampler: Sampler,
    weights: Weights,
    memories: Any,
    state: solvers.State,
    row: solvers.Rows,
    start: Start,
) -> solvers.State:
    """One step of the solver, by a row of the table."""
    velocity = _velocity(sampler, weights, memories)
    return solvers.step(sampler.solver, state, row, velocity, _fresh(sampler, start))


@functools.partial(jax.jit, static_argnums=0)
def finish(sampler: Sampler, weights: Weights, z: jax.Array) -> jax.Array:
    """What `draw` returns, of the last latents."""
    return _decode(sampler, weights, z)


@functools.partial(jax.jit, static_argnums=0)
def encode(autoencoder: Autoencoder, params: Any, images: jax.Array) -> jax.Array:
    """uint8 images (B, H, W, 3) -> the means of their latents (B, H', W', C), float32."""
    return autoencoder.encode(params, images.astype(jnp.float32) / 127.5 - 1.0, None)


def _memories(
    sampler: Sampler, weights: Weights, text: Text, null: Text, size: int
) -> tuple[TextMemory, TextMemory | None]:
    """Of the prompts, and of what guidance leads away from, both of `size` rows."""
    model, fixed = sampler.model, weights["frozen"]
    trained = variables(model, weights["params"], fixed)

    def encode_text(text: Text) -> TextMemory:
        llm = {"params": {"llm": fixed["llm"]}}
        features = model.apply(llm, text["ids"], text["mask"], method="read_text")
        pooled = None
        if sampler.clip is not None:
            pooled = sampler.clip.apply({"params": fixed["clip"]}, text["clip_ids"])
        return model.apply(trained, features, pooled, method="remember")

    memory = encode_text(text)
    if sampler.guidance is None:
        return memory, None
    null_memory = encode_text(null)
    return memory, null_memory if len(null["ids"]) == size else repeat(null_memory, size)


def _velocity(sampler: Sampler, weights: Weights, memories: Any) -> solvers.Velocity:
    model = sampler.model
    trained = variables(model, weights["params"], weights["frozen"])

    def denoise(z, t_B, memory):
        return model.apply(trained, z, t_B, memory, method="denoise")

    memory, null_memory = memories
    if sampler.guidance is None:
        return guidance.conditional(denoise, memory)
    return guidance.guided(denoise, memory, null_memory, sampler.guidance, interleave)


def _first(sampler: Sampler, start: Start) -> solvers.State:
    """The state at the first level."""
    z = start.latents_BHWC
    if z is None:
        z = jax.vmap(lambda key: jax.random.normal(key, sampler.latent_shape))(_keys(start))
        if start.image_BHWC is not None:
            z = flow.interpolate(start.image_BHWC, z, jnp.full(len(z), start.level))
    z = sharding.constrain(z, "batch", None, None, None)
    return solvers.start(sampler.solver, z, guidance.first(sampler.guidance, z))


def _fresh(sampler: Sampler, start: Start) -> Callable[[jax.Array], jax.Array]:
    """Noise of a step, other than that of the start."""

    def one(key, number):
        return jax.random.normal(jax.random.fold_in(key, number), sampler.latent_shape)

    def noise(number):
        fresh = jax.vmap(one, (0, None))(_keys(start), number)
        return sharding.constrain(fresh, "batch", None, None, None)

    return noise


def _keys(start: Start) -> jax.Array:
    """A key of each image, (B,)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(start.key, start.number_B)


@functools.partial(jax.jit, static_argnums=0)
def decode(autoencoder: Autoencoder, params: Any, z: jax.Array) -> jax.Array:
    """Latents (B, H', W', C) -> uint8 images (B, H, W, 3)."""
    images = autoencoder.decode(params, z)
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _decode(sampler: Sampler, weights: Weights, z: jax.Array) -> jax.Array:
    if not sampler.decodes:
        return z
    return decode(sampler.autoencoder, weights["frozen"]["autoencoder"], z)


def abstract_params(config: ConfigDict, mesh: Mesh, *, master: bool = False) -> Any:
    """Trained parameters as they are held for drawing: matrices in the dtype of the computation.

    With `master`, as a checkpoint has them: float32.
    """
    boxed, _ = build.abstract_params(config)
    return build.sharded(boxed if master else build.as_used(boxed), mesh)


def abstract_arguments(
    config: ConfigDict, mesh: Mesh, options: Options, batch: int
) -> dict[str, Any]:
    """The arguments of `draw` behind the first, by name, without values; drawn from pure noise."""

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    everywhere = sharding.replicated(mesh)
    fixed = build.abstract_frozen(config, mesh)
    number_B, level = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
        for shape, dtype in (((batch,), jnp.int32), ((), jnp.float32))
    )
    return {
        "weights": {"params": abstract_params(config, mesh), "frozen": fixed},
        "text": build.abstract_text(config, batch, sharding.batch_sharding(mesh)),
        "null": build.abstract_text(config, 1, everywhere),
        "start": Start(build.abstract_key(mesh), number_B, level),
        "rows": jax.tree.map(placed, table(options)),
    }
