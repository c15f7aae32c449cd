"""Digests find every change of one element, and are the same on any mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2i_jax import digest, sharding

MASK = 2**32 - 1
ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


def mix(x: int) -> int:
    """MurmurHash3's finaliser on Python's integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def oracle(bits: np.ndarray) -> int:
    """The definition, element by element."""
    total = 0
    for place in np.ndindex(*bits.shape):
        at = sum(odd * k for odd, k in zip(ODD, place, strict=False)) & MASK
        total += mix((int(bits[place]) + mix(at)) & MASK)
    return total & MASK


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 4)], ids=str)
def test_of_the_definition(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert digest.digests({"x": jnp.asarray(x)}) == {"x": oracle(x.view(np.uint32))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_every_bit_of_every_element_counts(dtype):
    x = np.random.default_rng(0).integers(0, 2, (3, 4)).astype(jnp.dtype(dtype))
    before = digest.digests({"x": jnp.asarray(x)})
    kind, width = f"uint{8 * x.dtype.itemsize}", 1 if dtype == "bool" else 8 * x.dtype.itemsize
    for place in np.ndindex(x.shape):
        for bit in range(width):
            other = x.view(kind).copy()
            other[place] ^= np.array(1 << bit, kind)
            changed = {"x": jnp.asarray(other.view(x.dtype))}
            assert digest.changed(changed, before) == ["x"], (place, bit)
    assert digest.changed({"x": jnp.asarray(x)}, before) == []


def test_order_counts():
    x = jnp.arange(12.0).reshape(3, 4)
    before = digest.digests([x])
    for other in (x[::-1], x[:, ::-1], x.reshape(4, 3).T, x.reshape(4, 3)):
        assert digest.changed([other], before) == ["0"]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 1)], ids=str)
def test_the_same_on_any_mesh(sizes):
    x = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    for spec in (P(), P("fsdp"), P("fsdp", "tensor"), P("tensor", "data")):
        put = jax.device_put(x, NamedSharding(mesh, spec))
        assert digest.digests({"x": put}) == {"x": oracle(x.view(np.uint32))}


def test_an_array_that_is_not_known_is_named():
    x = jnp.ones(3)
    known = digest.digests({"a": {"b": x}})
    assert digest.changed({"a": {"b": x, "c": x}}, known) == ["a/c"]
