"""Parameters under the names that others publish them by.

A table of `Rule`s says for each of our parameters which tensor holds it, and how the axes of the
two go together: "NH D -> D N H" is a matrix (N * H, D) there and an array (D, N, H) here. Nothing
else is specific to a model, and the table reads in both directions: `load` and `entries`.

Tensors pass one at a time; in loading, the host holds one parameter in the target dtype and, while
that is being filled, one tensor of the file.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import math
from typing import Any, NamedTuple, Protocol

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.interop.safetensors import Entry


class Readable(Protocol):
    """What `load` needs of a tensor, wherever it is stored."""

    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor."""


class Rule(NamedTuple):
    """Where one of our parameters is found in the files."""

    ours: str  # path in the parameter tree
    theirs: str  # name; with {L}, one tensor a layer, stacked along our first axis
    layout: str  # their axes -> ours, one letter an axis; letters written together are merged

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading layer axis, and they a tensor for each."""
        return "{L}" in self.theirs


def load(
    source: Any,
    tensors: Mapping[str, Readable],
    shapes: Mapping[str, tuple[int, ...]],
    rules: Iterable[Rule],
    shardings: Any,
    dtype: Any,
    *,
    unused: Collection[str] = (),
) -> dict[str, Any]:
    """A nested dict of parameters, each read by its rule and put where `shardings` says.

    Args:
      source: what errors call the place that the tensors come from.
      tensors: by their names.
      shapes: of our parameters, by their paths ('blocks/mlp/up/weight').
      rules: one for every path.
      shardings: a tree like the result, one for all, or None: the first device.
      dtype: of the result.
      unused: names that may be among the tensors and are not read.

    Raises ValueError naming the tensors that are missing, left over or of another shape.
    """
    rules = {rule.ours: rule for rule in rules}
    expected = {
        name: _their_shape(rules[ours].layout, shape[1:] if rules[ours].stacked else shape)
        for ours, shape in shapes.items()
        for name in names_of(rules[ours], shape)
    }
    _check(source, tensors, expected, unused)
    if isinstance(shardings, jax.sharding.Sharding):
        places = dict.fromkeys(shapes, shardings)
    else:
        places = flatten_dict(shardings, sep="/") if shardings is not None else {}
    if places and places.keys() != shapes.keys():
        raise ValueError(f"Shardings of {sorted(places)} for parameters {sorted(shapes)}.")
    params = {}
    for ours, shape in shapes.items():
        host = _read_parameter(tensors, rules[ours], shape, jnp.dtype(dtype))
        params[ours] = _put(host, places.get(ours))
    return unflatten_dict(params, sep="/")


def _read_parameter(tensors, rule: Rule, shape, dtype: np.dtype) -> np.ndarray:
    names = names_of(rule, shape)
    if not rule.stacked:
        x = _to_ours(tensors[names[0]].read(), rule.layout, shape)
        return np.ascontiguousarray(x, dtype)
    stacked = np.empty(shape, dtype)
    for layer, name in zip(stacked, names, strict=True):
        layer[...] = _to_ours(tensors[name].read(), rule.layout, shape[1:])
    return stacked


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Each device gets its own part alone; returns when the host's copy may go."""
    if sharding is None:
        return jax.block_until_ready(jnp.asarray(host))
    array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.block_until_ready(array)


def names_of(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    """Their tensors of one of our parameters, layer by layer where it is stacked."""
    if not rule.stacked:
        return [rule.theirs]
    return [rule.theirs.format(L=i) for i in range(shape[0])]


def _their_shape(layout: str, shape) -> tuple[int, ...]:
    theirs, ours = (side.split() for side in layout.split("->"))
    sizes = dict(zip(ours, shape, strict=True))
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in theirs)


def _to_ours(x: np.ndarray, layout: str, shape) -> np.ndarray:
    """Splits the merged axes of one of their tensors and puts all into our order."""
    theirs, ours = (side.split() for side in layout.split("->"))
    sizes = dict(zip(ours, shape, strict=True))
    letters = "".join(theirs)
    split = x.reshape([sizes[letter] for letter in letters])
    return split.transpose([letters.index(letter) for letter in ours])


def _check(source, tensors, expected, unused) -> None:
    """Raises ValueError naming what is missing, left over or of another shape."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and name not in unused]
    wrong = [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = {"missing": missing, "not known": extra, "of another shape": wrong}
    lines = [
        f"{len(names)} tensors {what}: {', '.join(names[:5])}{', ...' if names[5:] else ''}"
        for what, names in found.items()
        if names
    ]
    if lines:
        raise ValueError(f"{source} holds another network. {'; '.join(lines)}.")


def entries(
    params: Mapping[str, Any],
    rules: Iterable[Rule],
    read: Callable[[Any, int | None], np.ndarray],
) -> list[Entry]:
    """What is to be written so that `load` with these rules gives the same parameters.

    Args:
      params: path -> anything that has a shape.
      rules: one for every path, in the order in which tensors are written.
      read: (what `params` has, layer or None) -> that layer of it, or the whole, on the host.
    """
    out = []
    for rule in rules:
        leaf = params[rule.ours]
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        for i, name in enumerate(names_of(rule, leaf.shape)):
            layer = i if rule.stacked else None

            def make(leaf=leaf, layer=layer, layout=rule.layout):
                return _to_theirs(read(leaf, layer), layout)

            out.append(Entry(name, _their_shape(rule.layout, shape), make))
    return out


def _to_theirs(x: np.ndarray, layout: str) -> np.ndarray:
    """Puts the axes of one of our arrays into their order and merges them: `_to_ours` undone."""
    theirs, ours = (side.split() for side in layout.split("->"))
    letters = "".join(theirs)
    merged = _their_shape(layout, x.shape)
    return x.transpose([ours.index(letter) for letter in letters]).reshape(merged)
