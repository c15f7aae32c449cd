"""Low-rank factors: a fine-tuning that trains little, and stores little.

A weight W of a product stays as it is, and beside it two small factors are trained,

    y = x W + (alpha / r) (x A) B

A (inputs, r) random and B (r, outputs) zero at first, so that the model begins as its base (Hu et
al., arXiv 2106.09685). x A B is computed from the left, so that W needs no gradient, and neither
A B nor the gradient of W ever exists. Afterwards W + (alpha / r) A B is an ordinary weight.

The factors are a tree of their own, {path of W's module: {'a', 'b'}}, and reach the network as the
collection 'lora', in which layers.Einsum looks for its own. They keep W's axes, its heads and
layers among them, so that they are sharded as it is.
"""

import math
from typing import Any

from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.sharding import Named

_ATTENTION = ("q", "k", "v", "attention_out", "cross_q", "cross_out")
_MLP = ("gate", "up", "down")
# Which products have factors, by the names of their modules. Keys and values that a source of the
# memory learns, layer by layer, are among those of attention.
PRODUCTS = {"all": _ATTENTION + _MLP, "attention": _ATTENTION, "mlp": _MLP}


def factors(boxed: Any, rank: int, products: str) -> dict[str, Any]:
    """The factors of a tree of abstract `Named` parameters, likewise abstract and named, float32.

    Raises ValueError for an unknown choice of products.
    """
    if products not in PRODUCTS:
        raise ValueError(f"Unknown products {products!r}; known: {list(PRODUCTS)}.")
    out = {}
    for path, weight in flatten_dict(boxed).items():
        if not weight.inputs or path[-2] not in PRODUCTS[products]:
            continue
        stacked = weight.names[0] == "layers"
        split = stacked + weight.inputs
        (names_in, names_out), (sizes_in, sizes_out) = (
            (axes[:split], axes[split:]) for axes in (weight.names, weight.value.shape)
        )
        layers = (names_in[:stacked], sizes_in[:stacked])
        out[*path[:-1], "a"] = _named((*sizes_in, rank), (*names_in, "rank"), weight.inputs)
        out[*path[:-1], "b"] = _named(
            (*layers[1], rank, *sizes_out), (*layers[0], "rank", *names_out), 1
        )
    return unflatten_dict(out)


def _named(shape: tuple[int, ...], names: tuple[str | None, ...], inputs: int) -> Named:
    return Named(jax.ShapeDtypeStruct(shape, jnp.float32), names, inputs=inputs)


def init(key: jax.Array, boxed: Any) -> dict[str, Any]:
    """The factors before the first step: A normal with variance 1 / inputs, B zero; traceable."""
    flat = flatten_dict(boxed)
    keys = dict(zip(flat, jax.random.split(key, len(flat)), strict=True))

    def one(path, factor):
        shape = meta.unbox(factor).shape
        if path[-1] == "b":
            return jnp.zeros(shape, jnp.float32)
        inputs = math.prod(shape[-1 - factor.inputs : -1])
        return jax.random.normal(keys[path], shape, jnp.float32) * inputs**-0.5

    return unflatten_dict({path: one(path, factor) for path, factor in flat.items()})


def scaled(factors: Any, scale: float) -> dict[str, Any]:
    """The factors as the network takes them: with B times alpha / r."""
    flat = flatten_dict(factors)
    return unflatten_dict({p: scale * x if p[-1] == "b" else x for p, x in flat.items()})


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale A B of one layer, float32, in the shape of W; A has W's first axes, B its last."""
    rank = a.shape[-1]
    update = a.reshape(-1, rank).astype(np.float32) @ b.reshape(rank, -1).astype(np.float32)
    return weight.astype(np.float32) + np.float32(scale) * update.reshape(weight.shape)
