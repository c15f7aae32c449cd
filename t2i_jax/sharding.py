"""Where arrays live: the device mesh and the one table from logical to mesh axes.

Parameters and activations name their axes by what they are ('embed', 'heads', 'batch', ...); this
module alone knows what that means on a machine. Mesh axes are

    data    replicas of the parameters: the least traffic
    fsdp    shards of parameters, optimiser state, EMA and batch
    tensor  shards of heads, feed-forward width and vocabulary: the most traffic

A batch is split over data x fsdp. Every matrix has one axis on 'fsdp' (its model width) and at most
one on 'tensor'; vectors (norms, biases) are whole everywhere. Two axes of one array that claim the
same mesh axis are an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from t2i_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "image": None,
    "text": None,
    # parameters, and activations where the axis is the same
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": None,  # one head in Gemma 2B: too few to split
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "modulation": None,
    "patch": None,
    "layers": None,
    "norm": None,
}


class Named(nn.Partitioned):
    """A parameter with the logical names of its axes; no mesh is consulted where it is unboxed."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def with_axes(
    init: Callable[..., jax.Array], names: tuple[str | None, ...]
) -> Callable[..., Named]:
    """An initialiser whose result carries the logical names of its axes."""
    return lambda *args: Named(init(*args), names)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all of them).

    One of the sizes may be -1: what the others leave. Raises ValueError where the product is not
    the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = f"mesh (data, fsdp, tensor) = ({data}, {fsdp}, {tensor})"
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{given}: sizes are positive, and at most one is -1 (the rest).")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ConfigError(
            f"{given} does not fit {len(devices)} devices; mesh.data=1, mesh.fsdp=-1, "
            "mesh.tensor=1 always does."
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def to_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names.

    Raises ValueError for a name that is not in the table, and where two axes collide.
    """
    unknown = [name for name in axes if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"Unknown logical axes {unknown} in {tuple(axes)}; known: {list(RULES)}.")
    spec = [None if name is None else RULES[name] for name in axes]
    used = [m for entry in spec if entry for m in (entry if isinstance(entry, tuple) else (entry,))]
    if len(used) != len(set(used)):
        raise ValueError(f"Logical axes {tuple(axes)} claim a mesh axis twice: {spec}.")
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation by its logical axes; outside of a mesh, does nothing."""
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {x.shape}.")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, to_spec(axes))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of `Named` (abstract) parameters, unboxed.

    An axis that its mesh axes do not divide is left whole. A parameter without names raises.
    """

    def one(path, leaf):
        if not isinstance(leaf, Named):
            raise ValueError(f"Parameter {jax.tree_util.keystr(path)} has no logical axes.")
        return NamedSharding(mesh, _divisible(to_spec(leaf.names), leaf.value.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, Named))


def like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree (an optimiser state, say) that holds copies of the parameter tree.

    A leaf whose path ends in a parameter's path, and that has its shape, is sharded as that
    parameter is; everything else is replicated.
    """
    table = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = table.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over data x fsdp."""
    return NamedSharding(mesh, to_spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a global batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_held(mesh: Mesh, size: int) -> dict[int, tuple[int, ...]]:
    """Process -> the rows of a global batch of `size` that its devices hold, ascending.

    They follow from the mesh alone. On a TPU pod a host's chips are a square of the torus, so that
    its rows are several runs ((0, 1, 8, 9), say); where 'tensor' spans hosts, several hold the same
    ones. Raises ConfigError where the rows of two processes overlap without being the same.
    """
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((size,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(size)))
    groups = {frozenset(rows) for rows in held.values()}
    if sum(len(rows) for rows in groups) != size:
        sizes = ", ".join(f"mesh.{name} = {count}" for name, count in mesh.shape.items())
        raise ConfigError(
            f"{sizes}: the parts of the batch that different hosts hold overlap. Make mesh.tensor "
            "divide the devices of one host, or be a multiple of them."
        )
    return {process: tuple(sorted(rows)) for process, rows in held.items()}


def local_rows(mesh: Mesh, size: int) -> tuple[int, ...]:
    """The rows of a global batch of `size` that this process loads, ascending."""
    return rows_held(mesh, size)[jax.process_index()]


def tells_rows(mesh: Mesh) -> bool:
    """Whether this process is the first that holds its rows: what is told once, it tells."""
    held = rows_held(mesh, batch_shards(mesh))
    me = jax.process_index()
    return me == min(process for process, rows in held.items() if rows == held[me])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (`local_rows`; NumPy, rows first) -> global arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole (NumPy) -> global arrays, under one sharding.

    `jax.device_put` would compare them between the processes first, every time.
    """

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree of (abstract) arrays under these shardings."""
    sizes = jax.tree.map(
        lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def _divisible(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        shards = int(np.prod([mesh.shape[name] for name in names]))
        entries.append(entry if size % shards == 0 else None)
    return PartitionSpec(*entries)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
