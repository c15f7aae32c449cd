"""Weights under the names that others publish them by: what every such format shares.

A table of `Rule`s says for each of our parameters which tensor holds it, and how the axes of the
two go together: "NH D -> D N H" is a matrix (N * H, D) there and an array (D, N, H) here. Nothing
else is specific to a model, and the table reads in both directions.

Tensors are read one at a time; the host holds one parameter in the target dtype and, while that
is being filled, one tensor of the file. Only safetensors are read, never pickles. The format: the
length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and range
of bytes), the data (https://github.com/huggingface/safetensors).
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import json
import math
from typing import Any, NamedTuple, Protocol

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
_SIZES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_SIZES["I64"] = 8  # may be there, and is never a weight: the positions that old CLIPs stored
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, not read yet."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes

    def read(self) -> np.ndarray:
        """The tensor in its own dtype, read-only. Raises ValueError for integers."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.file}: a weight is {self.dtype!r}, not of {list(_DTYPES)}.")
        with self.file.open("rb") as f:
            f.seek(self.start)
            data = f.read(self.size)
        return np.frombuffer(data, _DTYPES[self.dtype]).reshape(self.shape)


def open_tensors(files: Iterable[epath.Path]) -> dict[str, Tensor]:
    """Name -> tensor of all the safetensors files; raises ValueError where one is damaged."""
    tensors = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in tensors:
                raise ValueError(f"{tensors[name].file} and {file} both hold {name}.")
            tensors[name] = tensor
    return tensors


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


def _header(file: epath.Path) -> dict[str, Tensor]:
    """The tensors of one file; every range of bytes is checked against the file's size."""

    def broken(what):
        return ValueError(f"{file} is not a whole safetensors file: {what}. Fetch it again.")

    total = file.stat().length
    with file.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if total < 8 or start > min(total, _MAX_HEADER):
            raise broken(f"its header ends at byte {start}, the file at {total}")
        try:
            header = dict(json.loads(f.read(start - 8)))
        except (ValueError, TypeError) as error:
            raise broken(f"its header does not parse ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = (entry[k] for k in ("dtype", "shape", "data_offsets"))
            known = dtype in _SIZES
            whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of {name} is {entry!r}") from error
        if not known:
            raise ValueError(f"{file}: {name} is {dtype!r}; weights are one of {list(_DTYPES)}.")
        size = math.prod(shape) * _SIZES[dtype] if whole else -1
        if not whole or last - first != size or start + last > total:
            raise broken(f"{name}, {dtype} {shape}, is at bytes {first} to {last} of its data")
        tensors[name] = Tensor(file, dtype, tuple(shape), start + first, size)
    return tensors
