"""Where arrays live: the device mesh and the one table from logical to mesh axes.

Parameters and activations name their axes by what they are ('embed', 'heads', 'batch', ...); this
module alone knows what that means on a machine. Mesh axes are

    data    replicas of the parameters: the least traffic
    fsdp    shards of parameters, optimiser state, EMA and batch
    tensor  shards of heads and feed-forward width: the most traffic

A batch is split over data x fsdp. Every matrix has one axis on 'fsdp' (its model width) and at most
one on 'tensor'; a table of embeddings has its rows on both; vectors (norms, biases) are whole
everywhere. Two axes of one array that claim the same mesh axis are an error.

A sharded matrix is gathered along 'fsdp' where it is used (`product`), one layer at a time inside
the loop over layers, and its gradient leaves as shards: along 'fsdp' weights travel, activations do
not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import math
from typing import Any

from flax import struct
import flax.linen as nn
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from t2i_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")
_FEWEST, _SHARDS = 8, 64  # of parameters, where the config leaves it open

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
    "vocab": ("fsdp", "tensor"),
    "modulation": None,
    "patch": None,
    "rank": None,  # of a pair of low-rank factors
    "layers": None,
    "norm": None,
}


class Named(nn.Partitioned):
    """A parameter with the logical names of its axes; no mesh is consulted where it is unboxed."""

    used_in: Any = struct.field(default=None, pytree_node=False)  # dtype it is cast to; None: none
    inputs: int = struct.field(default=0, pytree_node=False)  # axes that its product contracts

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def with_axes(
    init: Callable[..., jax.Array],
    names: tuple[str | None, ...],
    used_in: Any = None,
    inputs: int = 0,
) -> Callable[..., Named]:
    """An initialiser whose result carries the logical names of its axes.

    `used_in` is the dtype that the parameter is cast to before any use, if it is: where it is not
    trained, it may as well be held in that. `inputs` is, of the weight of a product, the number of
    axes that the product contracts: the first ones.
    """
    return lambda *args: Named(init(*args), names, used_in=used_in, inputs=inputs)


def make_mesh(data: int = -1, fsdp: int = -1, tensor: int = 1, *, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all of them).

    One of the sizes may be -1: what the others leave. Where data and fsdp both are, fsdp is the
    largest number from 8 to 64 that is a part of the torus, whole axes but not all of them: more
    shards save no memory worth having, and a gradient that is summed over the whole torus comes to
    every device instead of a shard to each. Where there is none, it is all devices of a slice, or
    the largest part. `data` spans slices, the others stay inside one. Raises ConfigError where the
    sizes are not those of the devices, with sizes that are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = f"mesh (data, fsdp, tensor) = ({data}, {fsdp}, {tensor})"
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{given}: sizes are positive, or -1 (the rest).")
    mesh = next(_meshes(sizes, devices), None)
    if mesh is not None:
        return mesh
    free = {"data": -1, "fsdp": -1}
    other = next(_meshes({**free, "tensor": tensor}, devices), None) or make_mesh(devices=devices)
    slices = _slices(devices)
    raise ConfigError(
        f"{given} does not fit {len(devices)} devices"
        + (f" in {slices} slices" if slices > 1 else "")
        + f"; ({', '.join(map(str, other.shape.values()))}) does: mesh.data=-1, mesh.fsdp=-1, "
        f"mesh.tensor={other.shape['tensor']}."
    )


def _slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _meshes(sizes: Mapping[str, int], devices: Sequence[Any]) -> Iterator[Mesh]:
    """Meshes of these sizes, -1 replaced, that the devices can form; the best first."""
    slices = _slices(devices)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    rest, remainder = divmod(len(devices), fixed)
    if remainder or not rest or (rest > 1 and not free):
        return
    if len(free) < 2:
        fillings = [dict.fromkeys(free, rest)]
    elif free == ["data", "fsdp"]:
        per_slice = rest // slices
        parts = [n for n in range(min(per_slice, _SHARDS), 0, -1) if per_slice % n == 0]
        parts.sort(key=lambda n: not _FEWEST <= n < per_slice)  # these first; else as they are
        fillings = [{"data": rest // n, "fsdp": n} for n in parts]
    else:
        return
    for filling in fillings:
        shape = tuple((sizes | filling).values())
        if shape[0] % slices:
            continue
        try:
            grid = _grid(shape, slices, devices)
        except NotImplementedError:  # not whole axes of the torus
            if len(fillings) > 1:
                continue
            grid = _grid(shape, slices, devices, allow_split_physical_axes=True)
        yield Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, ...], slices: int, devices: Sequence[Any], **options) -> np.ndarray:
    """The devices in this shape, neighbours near each other; the first axis spans slices."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, **options)
    inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, **options)


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


def product(x: jax.Array, matrix: jax.Array, axes: Sequence[str | None], sizes) -> jax.Array:
    """x (rows, inputs) @ matrix (inputs, outputs), the matrix gathered along 'fsdp' for it.

    Its two axes have the logical names `axes`; each may be several axes of a weight flattened, of
    which the first is named, and has `sizes`. The backward pass keeps the shards, gathers once
    more, and hands out the gradient as shards. Said explicitly, because the partitioner left alone
    moves activations instead, keeps whole matrices for the backward pass, and sums whole gradients
    where a scattered sum would do. What travels has the matrix's dtype: cast it before.

    A matrix of integers travels as such, is cast to x's dtype where it is multiplied, and has no
    gradient; its product is float32, to be scaled (quantization.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return _matmul(x, matrix)
    held = _divisible(to_spec(axes), sizes, mesh)
    whole = PartitionSpec(*(None if entry == "fsdp" else entry for entry in held))
    return _product(x, matrix, held, whole)


def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    if jnp.issubdtype(matrix.dtype, jnp.integer):
        return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return x @ matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, matrix, held, whole):
    del held
    return _matmul(x, jax.lax.with_sharding_constraint(matrix, whole))


def _product_forwards(x, matrix, held, whole):
    return _product(x, matrix, held, whole), (x, matrix)


def _product_backwards(held, whole, kept, gradient):
    x, matrix = kept
    matrix = jax.lax.with_sharding_constraint(matrix, whole)
    if jnp.issubdtype(matrix.dtype, jnp.integer):
        gradient, matrix = gradient.astype(x.dtype), matrix.astype(x.dtype)
        return jax.lax.dot_general(gradient, matrix, (((1,), (1,)), ((), ()))), None
    to_x = jax.lax.dot_general(gradient, matrix, (((1,), (1,)), ((), ())))
    to_matrix = jax.lax.dot_general(x, gradient, (((0,), (0,)), ((), ())))
    return to_x, jax.lax.with_sharding_constraint(to_matrix, held)


_product.defvjp(_product_forwards, _product_backwards)


def take_rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """table[ids]: (B, T, D), of a table with its axis 'vocab' sharded; the rows travel, not it.

    Every device looks up the ids of its 'fsdp' group in its own rows, and the sum over the group,
    of which one term is not zero, leaves each with its part of the batch: exact in any dtype. Where
    the batch is not one that is split, as a single prompt, every device gets all rows.
    Rows of int8 are added in bfloat16, which holds them: of int8, TPUs would sum whole batches.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, vocab = RULES["batch"], RULES["vocab"]
    whole = mesh.empty or mesh.size == 1
    if whole or table_VD.shape[0] % _shards(vocab, mesh):
        return jnp.take(table_VD, ids_BT, axis=0)
    split = ids_BT.shape[0] % _shards(batch, mesh) == 0

    def own_rows(table, ids):
        ids = jax.lax.all_gather(ids, "fsdp", tiled=True) if split else ids
        rows = ids - jax.lax.axis_index(vocab) * table.shape[0]
        own = (rows >= 0) & (rows < table.shape[0])
        found = jnp.where(own[..., None], jnp.take(table, jnp.where(own, rows, 0), axis=0), 0)
        if found.dtype == jnp.int8:
            found = found.astype(jnp.bfloat16)
        if not split:
            return jax.lax.psum(found, vocab)
        return jax.lax.psum(jax.lax.psum_scatter(found, "fsdp", tiled=True), "tensor")

    rows = PartitionSpec(batch if split else None)
    return jax.shard_map(own_rows, in_specs=(PartitionSpec(vocab), rows), out_specs=rows)(
        table_VD, ids_BT
    )


def device() -> tuple[str, str]:
    """(platform, kind) of the devices that a program is being made for: ('tpu', 'TPU v4')."""
    found = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    found = jax.devices()[0] if found is None else found
    return found.platform, found.device_kind


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
    return _shards(RULES["batch"], mesh)


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


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of (abstract) arrays that carry their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _divisible(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        entries.append(entry if size % _shards(entry, mesh) == 0 else None)
    return PartitionSpec(*entries)


def _shards(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
    """Into how many parts an axis with this entry of a spec is split."""
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return int(np.prod([mesh.shape[name] for name in names]))


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
