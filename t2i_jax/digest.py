"""A number for every array of a tree, by which another copy of it can be checked.

The digest of an array x is the sum, modulo 2**32, of mix(bits(x[i]) + mix(i)) over all its
elements, where mix is a permutation of the 32-bit integers (the finaliser of MurmurHash3). One
element that changes therefore always shows; any other change is missed once in 2**32 times. A sum
knows no order, so devices add up what they hold: nothing is gathered, and an array has the same
digest on any mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_AXES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)  # odd


def digests(tree: Any) -> dict[str, int]:
    """{path: digest} of the arrays of a tree. Every process calls it, and gets the same."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = jax.device_get({_name(path): _digest(x) for path, x in named})
    return {name: int(value) for name, value in found.items()}


def changed(tree: Any, expected: dict[str, int]) -> list[str]:
    """Paths of the arrays of a tree that `expected` does not have, or has with another digest."""
    return [name for name, value in digests(tree).items() if expected.get(name) != value]


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """uint32 scalar."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, odd in zip(range(bits.ndim), _AXES, strict=False):
        place += np.uint32(odd) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits.astype(jnp.uint32) + _mix(place)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
