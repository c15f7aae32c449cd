"""The table of axes, meshes, and training steps that are the same on every mesh."""

import dataclasses
import itertools
import math

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from configs import base
from t2i_jax import build, sharding
from t2i_jax.errors import ConfigError
from t2i_jax.training import optimizer, state
from tests import tiny

MESHES = [(1, 8, 1), (8, 1, 1), (2, 2, 2)]  # data, fsdp, tensor


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_the_table():
    assert sharding.to_spec(("batch", "image", None)) == P(("data", "fsdp"), None, None)
    assert sharding.to_spec(("layers", "embed", "heads", "head")) == P(None, "fsdp", "tensor", None)
    assert sharding.to_spec(("embed", "kv_heads", "head")) == P("fsdp", None, None)
    assert sharding.to_spec(("mlp", "embed")) == P("tensor", "fsdp")
    assert sharding.to_spec(("vocab", None)) == P(("fsdp", "tensor"), None)
    assert sharding.to_spec(("norm",)) == P(None)


def test_unknown_names_and_collisions_are_refused():
    with pytest.raises(ValueError, match=r"\['haeds'\] in \('embed', 'haeds'\); known: .*'heads'"):
        sharding.to_spec(("embed", "haeds"))
    for axes in (("mlp", "heads"), ("batch", "embed"), ("embed", "embed")):
        with pytest.raises(ValueError, match="claim a mesh axis twice"):
            sharding.to_spec(axes)


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, -1, 1), (1, 8, 1)),
        ((-1, -1, 4), (1, 2, 4)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_meshes(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """What is asked of a device to find its neighbours."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    "kind, grid, slices, shape",
    [
        ("TPU v4", (4, 4, 8), 1, (4, 32, 1)),
        ("TPU v5 lite", (16, 16, 1), 1, (16, 16, 1)),
        ("TPU v5 lite", (16, 16, 1), 2, (32, 16, 1)),
        ("TPU v6 lite", (8, 8, 1), 1, (8, 8, 1)),  # not all 64: gradients are scattered along rings
        ("TPU v6 lite", (4, 4, 1), 1, (1, 16, 1)),  # a ring of four would hold too much
        ("TPU v5", (2, 2, 1), 1, (1, 4, 1)),
    ],
)
def test_shards_are_whole_axes_of_the_torus(kind, grid, slices, shape):
    places = itertools.product(range(slices), *(range(n) for n in grid))
    chips = [Neighbour(i, tuple(place), kind, part) for i, (part, *place) in enumerate(places)]
    mesh = sharding.make_mesh(devices=chips)
    assert tuple(mesh.shape.values()) == shape
    for group in mesh.devices[..., 0]:  # a ring, or a torus of them
        moving = [axis for axis in range(3) if len({chip.coords[axis] for chip in group}) > 1]
        assert math.prod(grid[axis] for axis in moving) == len(group)
        assert len({chip.slice_index for chip in group}) == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, -1, 1), r"\(3, -1, 1\) does not fit 8 devices; \(1, 8, 1\) does: .*fsdp=-1"),
        ((2, 2, 1), r"\(2, 2, 1\) does not fit 8 devices; \(1, 8, 1\) does"),
        ((2, 2, 4), r"\(2, 2, 4\) does not fit 8 devices; \(1, 2, 4\) does: .*tensor=4"),
        ((16, -1, 1), r"\(16, -1, 1\) does not fit 8 devices"),
        ((1, -1, 3), r"\(1, -1, 3\) does not fit 8 devices; \(1, 8, 1\) does: .*tensor=1"),
        ((1, -1, -1), r"\(1, -1, -1\) does not fit 8 devices"),
        ((0, 8, 1), "sizes are positive"),
        ((1, -2, 1), "sizes are positive"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_constrain_needs_a_name_for_each_axis():
    with pytest.raises(ValueError, match="2 axis names"):
        sharding.constrain(jnp.zeros((2, 2, 2)), "batch", "image")
    x = jnp.zeros((8, 4))
    assert sharding.constrain(x, "batch", None) is x  # outside of a mesh
    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", None))(x)
        with pytest.raises(ValueError, match="Unknown logical axes"):
            sharding.constrain(x, "rows", None)
    assert y.addressable_shards[0].data.shape == (2, 4)


@pytest.mark.parametrize(
    "config", [base.get_config(), tiny.config(llm__vocab_size=304)], ids=["base", "tiny"]
)
def test_every_parameter_has_axes_and_every_matrix_is_sharded(config):
    """Over 8 devices all that is large is split: less than a quarter of the bytes on each."""
    trained, frozen = build.abstract_params(config)
    mesh = sharding.make_mesh()
    for boxed in (trained, frozen["llm"]):
        shardings = sharding.param_shardings(boxed, mesh)
        for path, where in flatten_dict(shardings, sep="/").items():
            name = path.split("/")
            axes = [m for e in where.spec for m in (e if isinstance(e, tuple) else (e,))]
            assert ("fsdp" in axes) == ("weight" in name and "norm" not in path), path
        whole = meta.unbox(boxed)
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
        held = sharding.bytes_per_device(build.sharded(boxed, mesh))
        assert total / 8 <= held < total / 4
    with pytest.raises(ValueError, match=r"Parameter \['a'\] has no logical axes"):
        sharding.param_shardings({"a": jnp.zeros(3)}, mesh)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_of_a_sharded_table_are_those_of_the_whole(sizes):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((48, 5)).astype(np.float32)
    ids = rng.integers(0, 48, (8, 3))
    up = rng.standard_normal((8, 3, 5)).astype(np.float32)
    mesh = mesh_of(sizes)
    placed = jax.device_put(table, jax.NamedSharding(mesh, sharding.to_spec(("vocab", None))))
    with jax.set_mesh(mesh):
        rows, back = jax.jit(lambda t: jax.vjp(lambda t: sharding.take_rows(t, ids), t))(placed)
        (grad,) = back(up)
        one_row = jax.jit(lambda t: sharding.take_rows(t, ids[:1]))(placed)  # not divisible
    np.testing.assert_array_equal(rows, table[ids])
    np.testing.assert_array_equal(one_row, table[ids[:1]])
    wanted = np.zeros_like(table)
    np.add.at(wanted, ids, up)
    np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), ("embed", "modulation")])
def test_a_product_gathers_weights_and_scatters_gradients(sizes, axes):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 24)))
    up = rng.standard_normal((16, 24)).astype(np.float32)
    mesh = mesh_of(sizes)
    place = jax.NamedSharding(mesh, sharding.to_spec(axes))
    rows = sharding.batch_sharding(mesh)

    def f(x, w):
        y, back = jax.vjp(lambda x, w: sharding.product(x, w, axes, w.shape), x, w)
        return y, *back(up)

    with jax.set_mesh(mesh):
        step = jax.jit(f, in_shardings=(rows, place), out_shardings=(rows, rows, place))
        y, to_x, to_w = step(x, w)
        text = step.lower(x, w).compile().as_text()
    np.testing.assert_allclose(y, x @ w, atol=1e-5)
    np.testing.assert_allclose(to_x, up @ w.T, atol=1e-5)
    np.testing.assert_allclose(to_w, x.T @ up, atol=1e-5)
    assert to_w.sharding.spec == place.spec
    assert ("all-gather" in text) == (mesh.shape["fsdp"] > 1)
    assert "all-to-all" not in text


def test_what_a_mesh_axis_does_not_divide_stays_whole():
    mesh, box = (
        sharding.make_mesh(1, 4, 2),
        lambda *s: sharding.Named(np.zeros(s), ("embed", "mlp")),
    )
    tree = {"both": box(8, 6), "embed": box(8, 5), "mlp": box(6, 6), "none": box(7, 7)}
    specs = {name: x.spec for name, x in sharding.param_shardings(tree, mesh).items()}
    assert specs == {
        "both": P("fsdp", "tensor"),
        "embed": P("fsdp", None),
        "mlp": P(None, "tensor"),
        "none": P(None, None),
    }


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_the_optimisers_state_lives_where_its_parameters_do(name):
    """Adam's two moments of a parameter, or Muon's one of a matrix, are sharded as it is."""
    config, mesh = tiny.config(optimizer__name=name), mesh_of((2, 2, 2))
    boxed, _ = build.abstract_params(config)
    trained = build.sharded(boxed, mesh)
    update, _ = optimizer.make(config.optimizer, 10, boxed)
    whole = jax.eval_shape(lambda p: state.create(p, update), trained)
    places = state.shardings(whole, trained, mesh)
    assert places.params == places.ema == jax.tree.map(lambda x: x.sharding, trained)
    params = flatten_dict(trained, sep="/")
    moments = dict.fromkeys(params, 0)
    for path, leaf in jax.tree.leaves_with_path(whole.opt_state):
        keys = "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
        where = at(places.opt_state, path)
        if "dit/" in keys and leaf.ndim:
            keys = keys[keys.index("dit/") :]
            assert where == params[keys].sharding, path
            moments[keys] += 1
        else:
            assert where.spec == P()
    muon = optimizer.matrix_dimensions(boxed)["dit"]
    matrices = {f"dit/{p}" for p, d in flatten_dict(muon, sep="/").items() if d is not None}
    for path, count in moments.items():
        assert count == (1 if name == "muon" and path in matrices else 2), path


def at(tree, path):
    for key in path:
        name = getattr(key, "name", None)
        tree = getattr(tree, name) if name else tree[getattr(key, "key", getattr(key, "idx", None))]
    return tree


LORA = {"lora__rank": 3, "optimizer__name": "adamw"}


def steps_on(sizes, count=3, **changes):
    """Steps as the loop runs them, on a mesh: (the last state, metrics by name, of every step)."""
    run, mesh = tiny.run(train__accumulation=2, **changes), mesh_of(sizes)
    trained = build.sharded(run.boxed, mesh)
    places = state.shardings(run.state, trained, mesh)
    like = build.abstract_params(run.config)[1]
    frozen = {
        name: jax.device_put(part, sharding.param_shardings(like[name], mesh))
        for name, part in run.frozen.items()
    }
    with jax.set_mesh(mesh):
        function = jax.jit(run.train_step(), donate_argnums=0, out_shardings=(places, None))
        current, batch = jax.device_put(run.state, places), sharding.shard_batch(run.batch, mesh)
        metrics = []
        for _ in range(count):  # noise and times are other ones in every step
            current, of_step = function(current, frozen, batch, jax.random.key(1))
            metrics.append(of_step)
    names = ("loss", "grad_norm", "update_norm", "param_norm")
    return current, {name: [float(of_step[name]) for of_step in metrics] for name in names}


@pytest.fixture(scope="module")
def on_one():
    return steps_on((1, 1, 1))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_steps_are_the_same_on_every_mesh(on_one, sizes):
    one, one_metrics = on_one
    many, metrics = steps_on(sizes)
    for name, values in one_metrics.items():
        assert len(set(values)) == 3
        np.testing.assert_allclose(metrics[name], values, rtol=1e-5, err_msg=name)
    tiny.close(many.params, one.params)
    tiny.close(many.opt_state, one.opt_state, 1e-4)
    weight = many.params["dit"]["blocks"]["mlp"]["gate"]["weight"]
    _, fsdp, tensor = sizes
    assert weight.addressable_shards[0].data.shape == (2, 24 // fsdp, 32 // tensor)
    assert len(weight.addressable_shards) == 8
    heads = many.ema["dit"]["blocks"]["attention"]["q"]["weight"]
    assert heads.addressable_shards[0].data.shape == (2, 24 // fsdp, 4 // tensor, 8)


@pytest.fixture(scope="module")
def factors_on_one():
    return steps_on((1, 1, 1), **LORA)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_steps_of_low_rank_factors_are_the_same_on_every_mesh(factors_on_one, sizes):
    one, one_metrics = factors_on_one
    many, metrics = steps_on(sizes, **LORA)
    for name, values in one_metrics.items():
        assert len(set(values)) == 3
        np.testing.assert_allclose(metrics[name], values, rtol=1e-5, err_msg=name)
    tiny.close(many.params, one.params)
    pair = many.params["dit"]["blocks"]["attention"]["q"]
    _, fsdp, tensor = sizes
    assert pair["a"].addressable_shards[0].data.shape == (2, 24 // fsdp, 3)
    assert pair["b"].addressable_shards[0].data.shape == (2, 3, 4 // tensor, 8)


def test_batches_go_to_the_devices_in_order():
    rows = np.arange(16).reshape(16, 1)
    array = sharding.shard_batch({"x": rows}, mesh_of((2, 2, 2)))["x"]
    np.testing.assert_array_equal(array, rows)
    parts = {tuple(shard.data[:, 0].tolist()) for shard in array.addressable_shards}
    assert parts == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}


class Chip:
    """A device of another process, for a mesh on which nothing is computed."""

    platform = device_kind = "none"
    client = None

    def __init__(self, number, process):
        self.id, self.process_index = number, process


def hosts_mesh(process_of_device):
    """A mesh of chips, each of them with the process that it belongs to."""
    chips = [Chip(i, p) for i, p in enumerate(np.ravel(process_of_device))]
    shape = np.array(chips).reshape(np.shape(process_of_device))
    return jax.sharding.Mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


# The chips of a v5e slice of 4 x 4, row by row: each of four hosts has a square of them.
SQUARES = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


@pytest.mark.parametrize(
    "processes, held",
    [
        (SQUARES.reshape(1, 16, 1), ["0145", "2367", "89cd", "abef"]),
        (SQUARES.reshape(4, 4, 1), ["0145", "2367", "89cd", "abef"]),
        (SQUARES.reshape(1, 4, 4), ["01234567"] * 2 + ["89abcdef"] * 2),
        (SQUARES.T.reshape(1, 8, 2), ["0145", "89cd", "2367", "abef"]),
        (np.array([1, 0]).reshape(1, 2, 1), ["89abcdef", "01234567"]),
    ],
)
def test_a_host_holds_the_rows_of_its_chips(monkeypatch, processes, held):
    mesh = hosts_mesh(processes)
    rows = [tuple(int(row, 16) for row in host) for host in held]
    assert sharding.rows_held(mesh, 16) == dict(enumerate(rows))
    for process, mine in enumerate(rows):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.local_rows(mesh, 16) == mine
        assert sharding.tells_rows(mesh) == (rows.index(mine) == process)


def test_hosts_whose_rows_overlap_are_refused():
    with pytest.raises(ConfigError, match=r"mesh.tensor = 2: the parts .* overlap"):
        sharding.rows_held(hosts_mesh(np.array([0, 0, 1, 1, 1, 0]).reshape(1, 3, 2)), 6)
