"""Checkpoints hold, bit by bit, the state that they were made of."""

import functools
import json
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax import checkpoint, sharding
from t2i_jax.training import state
from tests import tiny

OPTIMIZER = optax.adam(1e-3)
AXES = {"matrix": ("layers", "embed", "mlp"), "vector": ("norm",)}


def host_state(seed=0, width=16):
    """A state in NumPy; no two arrays are alike, and Adam's moments are not zero."""
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (2, 8, width), "vector": (width,)}

    def random(x):
        return rng.standard_normal(x.shape).astype(x.dtype)

    abstract = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    whole = jax.eval_shape(lambda p: state.create(p, OPTIMIZER), abstract)
    return jax.tree.map(lambda x: random(x) if x.ndim else np.full(x.shape, 7, x.dtype), whole)


def shardings_of(host, sizes):
    """The state's shardings on a mesh, as the training loop has them."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    boxed = {name: sharding.Named(host.params[name], axes) for name, axes in AXES.items()}
    places = sharding.param_shardings(boxed, mesh)
    trained = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), host.params, places
    )
    return state.shardings(host, trained, mesh)


def on_devices(host, sizes=(1, 8, 1)):
    """A state of its own memory: nothing is shared with `host`."""
    places = shardings_of(host, sizes)
    return jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=places)(host)


def like(host, sizes):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        host,
        shardings_of(host, sizes),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Checkpoints of steps 3, 5 and 9, made on a (1, 8, 1) mesh, of which two were to be kept."""
    path = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpoints(path, keep=2) as saved:
        for step in (3, 5, 9):
            saved.save(step, on_devices(host_state(step)), tiny.config(seed=step))
    return path


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 1)], ids=str)
def test_restored_on_any_mesh_every_bit_is_the_same(workdir, sizes):
    host = host_state(9)
    with checkpoint.Checkpoints(workdir) as saved:
        restored = saved.restore(9, like(host, sizes))
    tiny.equal(restored, host)
    tiny.equal(
        jax.tree.map(lambda x: x.sharding.spec, restored),
        jax.tree.map(lambda s: s.spec, shardings_of(host, sizes)),
    )
    matrix = restored.opt_state[0].mu["matrix"]
    assert matrix.addressable_shards[0].data.shape == (2, 8 // sizes[1], 16 // sizes[2])


def test_weights_and_config_are_read_alone(workdir):
    host = host_state(5)
    with checkpoint.Checkpoints(workdir) as saved:
        wanted = like(host, (1, 1, 1)).params
        tiny.equal(saved.weights(5, "ema", wanted), host.ema)
        tiny.equal(saved.weights(5, "params", wanted), host.params)
        assert saved.config(5).to_dict() == tiny.config(seed=5).to_dict()
        with pytest.raises(ValueError, match=r"'emma'.*'ema', 'params'"):
            saved.weights(5, "emma", wanted)


def test_the_newest_are_kept(workdir):
    with checkpoint.Checkpoints(workdir) as saved:
        assert saved.steps() == [5, 9]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["5", "9"]


def test_steps_that_reuse_the_memory_do_not_reach_what_is_being_saved(tmp_path):
    """16 MB are written in the background while steps overwrite them in place."""
    host = host_state(width=2**17)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(current):
        return jax.tree.map(lambda x: x + 1, current)

    for sizes in ((1, 1, 1), (1, 8, 1)):
        current = on_devices(host, sizes)
        with checkpoint.Checkpoints(tmp_path / str(sizes), keep=1) as saved:
            saved.save(1, current, tiny.config())
            for _ in range(5):
                current = jax.block_until_ready(step(current))
        with checkpoint.Checkpoints(tmp_path / str(sizes)) as saved:
            tiny.equal(saved.restore(1, like(host, sizes)), host)
        assert not np.array_equal(current.params["vector"], host.params["vector"])


def test_a_relative_working_directory_is_saved_to_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    host = host_state()
    with checkpoint.Checkpoints("runs/here", keep=1) as saved:
        saved.save(3, on_devices(host), tiny.config())
    assert checkpoint.find("runs/here")[1] == 3
    with checkpoint.Checkpoints("runs/here") as saved:
        restored = saved.restore(3, like(host, (1, 8, 1)))
    np.testing.assert_array_equal(restored.params["matrix"], host.params["matrix"])


def test_another_format_is_refused(workdir, tmp_path):
    shutil.copytree(workdir / "checkpoints" / "9", tmp_path / "checkpoints" / "9")
    file = tmp_path / "checkpoints" / "9" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    assert meta["format_version"] == checkpoint.FORMAT_VERSION and meta["step"] == 9
    for version in (99, None):
        meta["format_version"] = version
        file.write_text(json.dumps(meta))
        message = rf"checkpoints/9 has checkpoint format {version}.* reads formats \(1, 2\)"
        with checkpoint.Checkpoints(tmp_path) as saved:
            with pytest.raises(ValueError, match=message):
                saved.config(9)
            with pytest.raises(ValueError, match=message):
                saved.restore(9, like(host_state(), (1, 1, 1)))


def test_find(workdir, tmp_path):
    assert checkpoint.find(workdir) == (epath.Path(workdir), 9)
    assert checkpoint.find(str(workdir / "checkpoints" / "5")) == (epath.Path(workdir), 5)
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"7\.orbax-checkpoint-tmp.*launch/train\.py"):
        checkpoint.find(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*/nowhere: .*'checkpoints'"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds \['5', '9'\]"):
        checkpoint.find(workdir / "checkpoints" / "8")


def test_trees_are_written_whole_and_read_sharded(tmp_path):
    host = host_state().params
    tree = on_devices(host_state()).params
    checkpoint.save_tree(tmp_path / "llm", tree)
    assert [p.name for p in tmp_path.iterdir()] == ["llm"]
    restored = checkpoint.load_tree(tmp_path / "llm", like(host_state(), (2, 2, 2)).params)
    tiny.equal(restored, host)
    assert restored["matrix"].addressable_shards[0].data.shape == (2, 4, 8)
