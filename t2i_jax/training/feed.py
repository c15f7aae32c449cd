"""Batches on their way to the devices: sent while the one before is worked on, texts cut."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from t2i_jax import sharding
from t2i_jax.data.loader import Batch
from t2i_jax.data.samples import Fault

_TEXT = ("ids", "mask")  # arrays (b, T) that are cut


class Sent(NamedTuple):
    """A global batch on the devices, and which samples this host could not use for it."""

    arrays: dict[str, jax.Array]
    faults: tuple[Fault, ...]


def feed(
    batches: Iterator[Batch],
    mesh: Mesh,
    lengths: Sequence[int] = (),
    asked: Callable[[], bool] | None = None,
) -> Iterator[Sent]:
    """The batches of this host as global arrays, the next one sent before one is handed out.

    With `lengths`, texts are cut to the least of them that holds the longest of the global batch
    (or stay as they are): how long that is, the devices tell while they wait for the batch before.
    With `asked`, batches say whether this host was asked to stop: 'stop' (B,) int32.
    """
    waiting: tuple[Sent, jax.Array | None] | None = None
    for batch in batches:
        arrays = batch.arrays
        if asked is not None:
            arrays = {**arrays, "stop": np.full(len(arrays["ids"]), asked(), np.int32)}
        arrays = sharding.shard_batch(arrays, mesh)
        longest = _longest(mesh)(arrays["mask"]) if lengths else None
        if waiting is not None:
            yield _cut(*waiting, lengths)
        waiting = Sent(arrays, batch.faults), longest
    if waiting is not None:
        yield _cut(*waiting, lengths)


@functools.lru_cache(maxsize=4)
def _longest(mesh: Mesh):
    """Jitted: mask (B, T) -> tokens of the longest text, on every host."""
    return jax.jit(
        lambda mask_BT: jnp.max(jnp.sum(mask_BT, axis=1)), out_shardings=sharding.replicated(mesh)
    )


@functools.partial(jax.jit, static_argnums=1)
def _first(x_BT: jax.Array, length: int) -> jax.Array:
    return x_BT[:, :length]


def _cut(sent: Sent, longest: jax.Array | None, lengths: Sequence[int]) -> Sent:
    if longest is None:
        return sent
    fitting = [length for length in lengths if length >= int(longest)]
    width = sent.arrays["mask"].shape[1]
    if not fitting or min(fitting) >= width:
        return sent
    cut: dict[str, Any] = {name: _first(sent.arrays[name], min(fitting)) for name in _TEXT}
    return Sent({**sent.arrays, **cut}, sent.faults)
