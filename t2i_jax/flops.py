"""Floating-point operations of the model: what a step must compute, however it is compiled.

Counted on the program that JAX traces: 2 m n k for every product of matrices, likewise for
convolutions, loops as often as they run, nothing for what is element by element. A training step is

    batch x (3 DiT + LLM + autoencoder + CLIP)

because the gradient of a product is two products of its size, and what is frozen has none; what
remat computes again is no part of it. With low-rank factors the backward pass has one product for
each of the base's, not two: their gradient is traced, and counted, instead of 3 DiT. Attention
counts all pairs of queries and keys, those of the causal LLM, too. Model FLOPs utilisation is this
over the time and the peak of the devices.
"""

import functools
import math
from typing import Any

from flax.core import meta
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from t2i_jax import build
from t2i_jax.models import fusion, lora


def count(function, *args) -> float:
    """FLOPs of the products and convolutions in `function(*args)`; args may be abstract."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "cond":  # branches compute the same, one way or the other
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(map(_count, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs that an operation holds."""
    found = (getattr(value, "jaxpr", value) for value in params.values())
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]


def _dot(eqn: Any) -> float:
    left = eqn.invars[0].aval.shape
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    spec = eqn.params["dimension_numbers"].rhs_spec  # output features, input features, positions
    return 2.0 * eqn.outvars[0].aval.size * math.prod(kernel[i] for i in spec[1:])


def _abstract(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """(Boxed parameters, ids, mask, features, pooled, z, t) of one image."""
    model, _, _, shape, length, _ = key
    like = jax.ShapeDtypeStruct
    z, t = like((1, *shape), jnp.float32), like((1,), jnp.float32)
    ids, mask = like((1, length), jnp.int32), like((1, length), jnp.bool_)
    pooled = like((1, model.dit.pooled_width), jnp.float32) if model.dit.pooled_width else None
    boxed = jax.eval_shape(model.init, jax.random.key(0), z, t, ids, mask, pooled)["params"]
    read = functools.partial(model.apply, method="read_text")
    features = jax.eval_shape(read, {"params": meta.unbox(boxed)}, ids, mask)
    return boxed, ids, mask, features, pooled, z, t


def _velocity(model: Any, weights: Any, features: Any, pooled: Any, z: Any, t: Any) -> Any:
    memory = model.apply(weights, features, pooled, method="remember")
    return model.apply(weights, z, t, memory, method="denoise")


@functools.lru_cache(maxsize=8)
def _forward(key: tuple[Any, ...]) -> dict[str, float]:
    model, clip, autoencoder, shape, _, clip_length = key
    boxed, ids, mask, *inputs = _abstract(key)
    params, like = {"params": meta.unbox(boxed)}, jax.ShapeDtypeStruct
    out = {"llm": count(functools.partial(model.apply, method="read_text"), params, ids, mask)}
    out["dit"] = count(functools.partial(_velocity, model), params, *inputs)
    if clip is not None:
        words = like((1, clip_length), jnp.int32)
        out["clip"] = count(clip.apply, jax.eval_shape(clip.init, jax.random.key(0), words), words)
    weights = meta.unbox(jax.eval_shape(autoencoder.init, jax.random.key(0)))
    side = autoencoder.downsample
    image = like((1, shape[0] * side, shape[1] * side, 3), jnp.float32)
    latents = like((1, *shape), jnp.float32)
    out["encode"] = count(lambda p, x: autoencoder.encode(p, x, None), weights, image)
    out["decode"] = count(lambda p, x: autoencoder.decode(p, x, 0), weights, latents)
    return out


@functools.lru_cache(maxsize=8)
def _of_factors(key: tuple[Any, ...], rank: int, products: str) -> float:
    """FLOPs of the gradient of the low-rank factors for one image, and of its forward pass."""
    model = key[0]
    boxed, _, _, *inputs = _abstract(key)
    trained = {name: part for name, part in boxed.items() if name not in fusion.FROZEN}
    factors = meta.unbox(lora.factors(trained, rank, products))

    def total(factors, base, *inputs):
        weights = fusion.variables(model, factors, {"base": base})
        return jnp.sum(_velocity(model, weights, *inputs))

    return count(jax.grad(total), factors, meta.unbox(boxed), *inputs)


def _key(config: ConfigDict, text_tokens: int | None) -> tuple[Any, ...]:
    """What the counts are kept by."""
    length = text_tokens or config.data.max_text_tokens
    model = build.model(config)
    plain = model.clone(
        llm=model.llm.clone(kernel="xla", unroll=1),
        dit=model.dit.clone(kernel="xla", unroll=1, remat="none"),
    )
    shape, clip = build.latent_shape(config), build.clip(config)
    ids = config.clip.max_tokens
    return plain, clip, build.make_autoencoder(config), shape, length, ids


def forward(config: ConfigDict, text_tokens: int | None = None) -> dict[str, float]:
    """FLOPs for one image: {'dit': one evaluation, 'llm': its prompt, 'encode', 'decode', 'clip'}.

    `text_tokens` is the length of a row of text, default data.max_text_tokens.
    """
    return _forward(_key(config, text_tokens))


def train_step(
    config: ConfigDict, text_tokens: int | None = None, *, latents: bool = False
) -> dict[str, float]:
    """FLOPs of a step on the whole batch, by part; with stored `latents` nothing is encoded."""
    one, batch = forward(config, text_tokens), config.train.batch_size
    dit = 3 * one["dit"]
    if rank := config.lora.rank:
        dit = _of_factors(_key(config, text_tokens), rank, config.lora.products)
    out = {"dit": dit, "llm": one["llm"], "autoencoder": one["encode"]}
    if latents:
        del out["autoencoder"]
    if "clip" in one:
        out["clip"] = one["clip"]
    return {part: batch * count for part, count in out.items()}


def sample(
    config: ConfigDict, images: int, evaluations: int, guided: int | None = None
) -> dict[str, float]:
    """FLOPs of drawing `images`: prompts once, the DiT at every evaluation, twice if guided.

    `guided` evaluations are; None: all of them.
    """
    one, guided = forward(config), evaluations if guided is None else guided
    return {
        "dit": images * (evaluations + guided) * one["dit"],
        "llm": (images + (guided > 0)) * one["llm"],
        "autoencoder": images * one["decode"],
    }
