"""Parameters under the names that others publish them by.

A table of `Rule`s says for each of our parameters which tensor holds it, and how the axes of the
two go together: "NH D -> D N H" is a matrix (N * H, D) there and an array (D, N, H) here. Nothing
else is specific to a model, and the table reads in both directions:

    sources      their tensors -> `Source`s of our parameters, nothing read yet
    entries      `Source`s -> their tensors, to be written
    materialise  `Source`s -> arrays on the devices

A parameter of all layers is one tensor a layer there. Layers pass one at a time in whichever
direction: the host holds one of them, and in `materialise` one parameter in the target dtype.
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import math
import types
from typing import Any, NamedTuple, Protocol

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import quantization
from t2i_jax.interop.safetensors import Entry

_SQUARE = 256  # elements a side that are transposed at once: they fit a cache


class Readable(Protocol):
    """One tensor of others, wherever it is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The tensor."""


class Source(Protocol):
    """One of our parameters, wherever and however it is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """That layer of a parameter of all layers, or the whole parameter."""


class Rule(NamedTuple):
    """Where one of our parameters is found in the files."""

    ours: str  # path in the parameter tree
    theirs: str  # name; with {L}, one tensor a layer, stacked along our first axis
    layout: str  # their axes -> ours, one letter an axis; letters written together are merged

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading layer axis, and they a tensor for each."""
        return "{L}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A `Source` whose tensors a rule names."""

    rule: Rule
    shape: tuple[int, ...]
    tensors: tuple[Readable, ...]  # a layer each, or one

    @property
    def stacked(self) -> bool:
        """Whether its layers are tensors of their own."""
        return self.rule.stacked

    @property
    def dtype(self) -> np.dtype:
        """Of the file's tensors."""
        return self.tensors[0].dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """That layer, or the whole."""
        if not self.rule.stacked:
            x = _to_ours(self.tensors[0].read(), self.rule.layout, self.shape)
            return x if layer is None else x[layer]
        if layer is None:
            return np.stack([self.read(i) for i in range(self.shape[0])])
        return _to_ours(self.tensors[layer].read(), self.rule.layout, self.shape[1:])


def sources(
    where: Any,
    tensors: Mapping[str, Readable],
    shapes: Mapping[str, tuple[int, ...]],
    rules: Iterable[Rule],
    *,
    unused: Collection[str] = (),
) -> dict[str, Mapped]:
    """Path -> source of each of our parameters; nothing is read.

    Args:
      where: what errors call the place that the tensors come from.
      tensors: by their names.
      shapes: of our parameters, by their paths ('blocks/mlp/up/weight').
      rules: one for every path.
      unused: names that may be among the tensors and are not read.

    Raises ValueError naming the tensors that are missing, left over or of another shape.
    """
    rules = {rule.ours: rule for rule in rules}
    expected = {
        name: _their_shape(rules[ours].layout, shape[1:] if rules[ours].stacked else shape)
        for ours, shape in shapes.items()
        for name in names_of(rules[ours], shape)
    }
    check(where, tensors, expected, unused)
    return {
        ours: Mapped(rules[ours], shape, tuple(tensors[n] for n in names_of(rules[ours], shape)))
        for ours, shape in shapes.items()
    }


def materialise(
    found: Mapping[str, Source],
    shardings: Any,
    dtype: Any,
    matrices: Mapping[str, quantization.Matrix] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """A nested dict of parameters, each put where `shardings` says, in the dtype that `dtype` says.

    Either is a nested dict like the result, or one for all; the sharding None is the first device.
    What `matrices` names is quantised instead, and gets a scale beside it.
    """
    scales = set(map(quantization.scale_of, matrices))
    places, dtypes = _by_path(shardings, {*found, *scales}), _by_path(dtype, found)
    params = {}
    for ours, source in found.items():
        if ours in matrices:
            made = quantization.read(ours, source, matrices[ours])
        else:
            made = {ours: _whole(source, jnp.dtype(dtypes[ours]))}
        params |= {path: _put(host, places[path]) for path, host in made.items()}
    return unflatten_dict(params, sep="/")


def _by_path(value: Any, found: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(found, value)
    flat = flatten_dict(value, sep="/")
    if flat.keys() != set(found):
        raise ValueError(f"What is given for {sorted(flat)} is for parameters {sorted(found)}.")
    return flat


def _whole(source: Source, dtype: np.dtype) -> np.ndarray:
    if not getattr(source, "stacked", False):
        return np.ascontiguousarray(source.read(), dtype)
    stacked = np.empty(source.shape, dtype)
    for i, layer in enumerate(stacked):
        layer[...] = source.read(i)
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
    return _permuted(split, [letters.index(letter) for letter in ours])


def check(
    source: Any,
    tensors: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    unused: Collection[str] = (),
) -> None:
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


def entries(found: Mapping[str, Source], rules: Iterable[Rule]) -> list[Entry]:
    """What is to be written so that `sources` with these rules gives the same parameters.

    There must be a source for every rule; tensors are written in the order of the rules.
    """
    out = []
    for rule in rules:
        source = found[rule.ours]
        shape = source.shape[1:] if rule.stacked else source.shape
        for i, name in enumerate(names_of(rule, source.shape)):
            layer = i if rule.stacked else None

            def make(source=source, layer=layer, layout=rule.layout):
                return _to_theirs(source.read(layer), layout)

            out.append(Entry(name, _their_shape(rule.layout, shape), make))
    return out


def _to_theirs(x: np.ndarray, layout: str) -> np.ndarray:
    """Puts the axes of one of our arrays into their order and merges them: `_to_ours` undone."""
    theirs, ours = (side.split() for side in layout.split("->"))
    letters = "".join(theirs)
    merged = _their_shape(layout, x.shape)
    return _permuted(x, [ours.index(letter) for letter in letters]).reshape(merged)


def _permuted(x: np.ndarray, axes: list[int]) -> np.ndarray:
    """x.transpose(axes).

    Where its first axes and its others change places, which is most of what there is to do, it is
    the transpose of a matrix, copied square by square: numpy's own copy takes three times as long.
    """
    first = axes[0]
    if axes != [*range(first, x.ndim), *range(first)] or first == 0 or x.size < _SQUARE**2:
        return x.transpose(axes)
    matrix = x.reshape(math.prod(x.shape[:first]), -1)
    matrix = matrix.view(f"u{x.dtype.itemsize}")  # bits are bits
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for i in range(0, matrix.shape[0], _SQUARE):
        for j in range(0, matrix.shape[1], _SQUARE):
            rows, columns = slice(i, i + _SQUARE), slice(j, j + _SQUARE)
            out[columns, rows] = matrix[rows, columns].T
    return out.view(x.dtype).reshape([x.shape[axis] for axis in axes])
