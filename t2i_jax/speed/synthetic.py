"""Numbers in the shapes that a program takes, made where they live: no files, no data.

Weights and batches are hashes of their indices, so that every device makes its own part and
nothing is ever whole on one: a model of any size that the devices can hold can be measured.
"""

from typing import Any

import jax
import jax.numpy as jnp

_SPREAD = 0.02  # standard deviation of weights
_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


def like(abstract: Any, vocabulary: int = 1) -> Any:
    """Arrays for a tree of abstract ones that carry their shardings (ShapeDtypeStruct).

    Floats are weights, around 0; int8 quantised ones; int32 are token ids below `vocabulary`; uint8
    pixels; uint16 the bits of bfloat16 numbers in [0, 2); booleans are True.
    """

    def make() -> Any:
        leaves, structure = jax.tree.flatten(abstract)
        arrays = [_one(i, x, vocabulary) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, arrays)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()


def _one(number: int, x: Any, vocabulary: int) -> jax.Array:
    if x.dtype == jnp.bool_:
        return jnp.ones(x.shape, bool)
    bits = jnp.full(x.shape, number * 0x2545F491 & 0xFFFFFFFF, jnp.uint32)
    for axis in range(len(x.shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        bits = bits ^ (index * jnp.uint32(_ODD[axis % len(_ODD)]))
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
        bits = (bits ^ (bits >> 12)) * jnp.uint32(0x297A2D39)
        bits = bits ^ (bits >> 15)
    if jnp.issubdtype(x.dtype, jnp.floating):
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # in [-1, 1)
        return (uniform * _SPREAD * 3**0.5).astype(x.dtype)
    if x.dtype in (jnp.uint8, jnp.int8):
        return jax.lax.bitcast_convert_type((bits >> 24).astype(jnp.uint8), x.dtype)
    if x.dtype == jnp.uint16:
        return (bits >> 18).astype(x.dtype)
    return (bits % jnp.uint32(vocabulary)).astype(x.dtype)
