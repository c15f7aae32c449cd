"""Matrices of a frozen network in int8, with a float32 scale for every output channel.

    w ~ scale q,    scale = max |w| / 127 over the channel's inputs,    q = round(w / scale)

Symmetric and of the weights alone; |w - scale q| <= scale / 2. A product is (x q) scale, so that
what lies on a device, and what it gathers, is q (sharding.product, models/layers.py). In the tree
of parameters 'scale' lies beside the 'weight' that it belongs to, with the axes of the outputs; an
embedding has one for each of its rows. Norms, and what is on disk, stay as they are: quantised is
what is loaded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.sharding import Named

METHODS = ("none", "int8")
_LEVELS = 127


class Matrix(NamedTuple):
    """What quantising a parameter takes to know."""

    stacked: bool  # whether it has a leading axis of layers
    inputs: tuple[int, ...]  # axes, of one layer, that a product sums over

    @property
    def outputs(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Of something for each axis, what the scale's axes have."""
        summed = {axis + self.stacked for axis in self.inputs}
        return lambda axes: tuple(x for i, x in enumerate(axes) if i not in summed)


def matrices(boxed: Any) -> dict[str, Matrix]:
    """Path -> matrix, of a tree of `Named` parameters: weights of products, and embeddings."""
    found = {}
    for path, box in flatten_dict(boxed, sep="/").items():
        stacked = box.names[0] == "layers"
        if box.inputs:
            found[path] = Matrix(stacked, tuple(range(box.inputs)))
        elif box.names[0] == "vocab":  # it hands out its rows
            found[path] = Matrix(stacked, (1,))
    return found


def scale_of(path: str) -> str:
    """Where the scale of the matrix at `path` lies."""
    return path.removesuffix("weight") + "scale"


def abstract(boxed: Any) -> Any:
    """A tree of abstract `Named` parameters, as it is with its matrices in int8."""
    flat = flatten_dict(boxed, sep="/")
    for path, matrix in matrices(boxed).items():
        shape, names = flat[path].value.shape, flat[path].names
        # As of a bias: what is gathered of a matrix, its scale has whole on every device.
        axes = ("norm" if name in ("embed", "vocab") else name for name in matrix.outputs(names))
        scale = jax.ShapeDtypeStruct(matrix.outputs(shape), jnp.float32)
        flat[path] = Named(jax.ShapeDtypeStruct(shape, jnp.int8), names)
        flat[scale_of(path)] = Named(scale, tuple(axes))
    return unflatten_dict(flat, sep="/")


def read(path: str, source: Any, matrix: Matrix) -> dict[str, np.ndarray]:
    """{path: int8, that of its scale: float32} of a source (interop/mapping.py) of one matrix.

    One layer at a time is in float32. Raises ValueError where a value is not finite.
    """
    values = np.empty(source.shape, np.int8)
    scale = np.empty(matrix.outputs(source.shape), np.float32)
    for i in range(source.shape[0]) if matrix.stacked else (None,):
        at = ... if i is None else i
        values[at], scale[at] = quantise(source.read(i), matrix.inputs)
    if not np.isfinite(scale).all():
        raise ValueError(f"{path} has values that are not finite.")
    return {path: values, scale_of(path): scale}


def quantise(w: np.ndarray, inputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of w's shape, float32 scale of its axes but `inputs`)."""
    w = w.astype(np.float32)
    largest = np.maximum(w.max(inputs, keepdims=True), -w.min(inputs, keepdims=True))
    scale = largest / np.float32(_LEVELS)
    scale[scale == 0] = 1  # of a channel of zeros, or of less than can be divided
    with np.errstate(invalid="ignore"):  # of what is not finite, the scale tells
        w /= scale
        return np.rint(w, out=w).astype(np.int8), scale.squeeze(inputs)
