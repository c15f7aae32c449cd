"""The language model in int8: how far it is rounded, where it lies, what a run makes of it."""

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import build, convert, flops, frozen, machines, plan, quantization, sharding
from t2i_jax.errors import ConfigError
from t2i_jax.interop import native
from t2i_jax.models import layers
from t2i_jax.pipeline import Pipeline
from t2i_jax.speed import compile as compiler
from t2i_jax.speed import ideal
from t2i_jax.stored_arrays import tree_sources
from t2i_jax.training import loop, program
from tests import tiny, toys
from tests.test_config import changed, problems

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]  # data, fsdp, tensor
INT8 = {"llm__vocab_size": 304, "train__llm_quantization": "int8"}
INPUTS = {  # axes that a product sums over, after those of the layers and of the rows
    "embed": 1,
    "blocks/attention/q": 1,
    "blocks/attention/k": 1,
    "blocks/attention/v": 1,
    "blocks/attention_out": (1, 2),
    "blocks/mlp/gate": 1,
    "blocks/mlp/up": 1,
    "blocks/mlp/down": 1,
}
RUN = INT8 | {"pretrain__steps": 60, "pretrain__batch_size": 32, "optimizer__name": "adamw"}
RUN |= {"train__steps": 3, "validation__every": 3}


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def placed(params, sizes, **changes):
    """The parameters of a language model as a run loads them."""
    found = {f"llm/{p}": toys.Memory(np.asarray(x)) for p, x in params.items()}
    config = tiny.config(**INT8, **changes)
    return frozen.place(config, mesh_of(sizes), found, None)[1]["llm"]


@pytest.fixture(scope="module")
def params():
    """Random ones, flat; a row and a channel of zeros, and one channel of tiny numbers."""
    net = build.model(tiny.config(**INT8))
    flat = {p: np.array(x) for p, x in flatten_dict(tiny.params(net)["llm"], sep="/").items()}
    flat["embed/weight"][7] = flat["blocks/mlp/up/weight"][1, :, 3] = 0
    flat["blocks/mlp/up/weight"][1, :, 4] *= 1e-43
    return flat


def dequantised(tree):
    """A tree of float64 in which matrices are scale * q, and the largest |q| of every channel."""
    flat, largest = flatten_dict(tree, sep="/"), {}
    out = {p: np.asarray(x, np.float64) for p, x in flat.items() if not p.endswith("scale")}
    for path, inputs in INPUTS.items():
        q, scale = flat[f"{path}/weight"], flat[f"{path}/scale"]
        assert q.dtype == jnp.int8 and scale.dtype == jnp.float32
        step = np.expand_dims(np.asarray(scale, np.float64), inputs)
        largest[path] = np.abs(np.asarray(q, int)).max(inputs)
        out[f"{path}/weight"] = np.asarray(q, np.float64) * step
    return out, largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_value_is_off_by_half_a_step_of_its_channel_at_most(params, sizes, dtype):
    stored = {p: x.astype(jnp.dtype(dtype)) for p, x in params.items()}
    found, largest = dequantised(placed(stored, sizes, train__frozen_dtype=dtype))
    assert found.keys() == params.keys()
    for path, w in stored.items():
        w = w.astype(np.float64)
        inputs = INPUTS.get(path.removesuffix("/weight"))
        if inputs is None:  # a norm
            np.testing.assert_array_equal(found[path], w)
            continue
        peak = np.abs(w).max(inputs, keepdims=True)
        assert (np.abs(found[path] - w) <= peak / 254 * (1 + 1e-4) + 1e-40).all(), path
        used = largest[path.removesuffix("/weight")]
        np.testing.assert_array_equal(used, np.where(peak.squeeze(inputs) < 1e-40, 0, 127))


def test_shards_are_int8_and_scales_follow_the_outputs(params):
    held = flatten_dict(placed(params, (2, 2, 2)), sep="/")
    config, mesh = tiny.config(**INT8), mesh_of((2, 2, 2))
    expected = flatten_dict(build.quantised(config, build.abstract_params(config)[1])["llm"])
    assert {"/".join(p) for p in expected} == held.keys()
    shapes = {p: x.addressable_shards[0].data.shape for p, x in held.items()}
    assert shapes["blocks/attention/q/weight"] == (3, 8, 2, 8)
    assert shapes["blocks/attention/q/scale"] == (3, 2, 8)
    assert shapes["blocks/attention_out/weight"] == (3, 2, 8, 8)
    assert shapes["blocks/attention_out/scale"] == (3, 16)
    assert shapes["blocks/mlp/down/scale"] == (3, 16)
    assert shapes["embed/weight"] == (76, 16) and shapes["embed/scale"] == (304,)
    total = sum(x.size * x.dtype.itemsize for x in held.values())
    like = build.abstract_frozen(config, mesh)["llm"]
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like)) == total


def read(params, ids, mask):
    net = build.model(tiny.config(**INT8))
    return jax.jit(net.apply, static_argnames="method")(
        {"params": {"llm": params}}, ids, mask, method="read_text"
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_text_is_read_with_scale_times_q(params, sizes):
    """As by the same model in float32, of matrices that are multiplied out, on one device."""
    held = placed(params, sizes)
    plain = {p: jnp.asarray(x, jnp.float32) for p, x in dequantised(held)[0].items()}
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 304, (8, 5))
    mask = np.arange(5) < rng.integers(1, 6, (8, 1))
    expected = read(unflatten_dict(plain, sep="/"), ids, mask)
    with jax.set_mesh(mesh_of(sizes)):
        tiny.close(read(held, ids, mask), expected)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_product_gathers_int8_and_hands_back_the_gradient_of_x(sizes):
    rng = np.random.default_rng(0)
    x, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (16, 4, 6)))
    q = rng.integers(-127, 128, (8, 4, 6), np.int8)
    scale = rng.uniform(0.01, 0.1, (4, 6)).astype(np.float32)
    net = layers.Einsum("BD,DNH->BNH", q.shape, ("embed", "heads", "head"))

    def f(x, params):
        y, back = jax.vjp(lambda x: net.apply({"params": params}, x), x)
        return y, *back(up)

    mesh = mesh_of(sizes)
    place = jax.NamedSharding(mesh, sharding.to_spec(("embed", "heads", "head")))
    params = {"weight": jax.device_put(q, place), "scale": scale}
    with jax.set_mesh(mesh):
        step = jax.jit(f)
        y, to_x = step(x, params)
        text = step.lower(x, params).compile().as_text()
    w = q * scale.astype(np.float64)
    np.testing.assert_allclose(y, np.einsum("BD,DNH->BNH", x, w), atol=1e-5)
    np.testing.assert_allclose(to_x, np.einsum("BNH,DNH->BD", up, w), atol=1e-5)
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert bool(gathers) == (mesh.shape["fsdp"] > 1)
    assert all("s8[8," in line.split(" all-gather(")[0] for line in gathers)


def test_logits_of_a_quantised_embedding():
    q = np.random.default_rng(0).integers(-127, 128, (11, 4), np.int8)
    scale = np.linspace(0.01, 0.2, 11, dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    params = {"params": {"weight": q, "scale": scale}}
    found = layers.Embed(11, 4).apply(params, x, method="decode")
    np.testing.assert_allclose(found, x @ (q * scale[:, None]).T, atol=1e-4)


def test_a_value_that_is_no_number_is_named(params):
    for value in (np.nan, np.inf, -np.inf):
        bad = {p: x.copy() for p, x in params.items()}
        bad["blocks/mlp/gate/weight"][2, 1, 5] = value
        with pytest.raises(ConfigError, match="blocks/mlp/gate/weight has values that are not"):
            placed(bad, (1, 1, 1))


# --- a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The working directory of a run in int8, whose language model has learnt a little."""
    workdir = tmp_path_factory.mktemp("int8") / "run"
    loop.train(tiny.config(**RUN), workdir)
    return workdir


@pytest.fixture(scope="module")
def exact(run):
    """The parameters of its language model as they were trained, flat."""
    return {p: source.read() for p, source in tree_sources(frozen.llm_path(run)).items()}


def relative(found, exact):
    """Root of the mean square of the error over that of the values, of every layer."""
    found, exact = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, exact))
    return np.sqrt(np.mean((found - exact) ** 2, 1) / np.mean(exact**2, 1))


def test_a_language_model_made_here_is_kept_whole_and_its_text_memory_is_close(run, exact):
    """Keys, values and the last state, each layer."""
    assert {str(x.dtype) for x in exact.values()} == {"float32"}
    pipeline = Pipeline.load(run)
    assert pipeline.frozen["llm"]["blocks"]["mlp"]["up"]["weight"].dtype == jnp.int8
    text = pipeline.prompts.encode(["a red ring", "two blue squares above a green cross"] * 4)
    whole = read(unflatten_dict(exact, sep="/"), text["ids"], text["mask"])
    with jax.set_mesh(pipeline.mesh):
        held = read(pipeline.frozen["llm"], text["ids"], text["mask"])
    for name in ("keys_LBTKH", "values_LBTKH"):
        error = relative(getattr(held, name), getattr(whole, name))
        assert len(error) == 3 and (error < 0.02).all(), (name, error)
        assert (error > 1e-4).all()  # it is quantised
    (error,) = relative(held.hidden_BTD[None], whole.hidden_BTD[None])
    assert error < 0.02


def test_the_loss_is_nearly_that_of_the_whole_model(exact):
    """Of every one of eight steps, on one device; the two runs differ in nothing else."""
    parts = tiny.run(**{"llm__vocab_size": 304, "optimizer__name": "adamw"})
    step = jax.jit(parts.train_step())
    losses = []
    for llm in (unflatten_dict(exact, sep="/"), placed(exact, (1, 1, 1))):
        state, own = parts.state, []
        for _ in range(8):
            fixed = {"llm": llm, "autoencoder": {}}
            state, metrics = step(state, fixed, parts.batch, jax.random.key(1))
            own.append(float(metrics["loss"]))
        losses.append(own)
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    assert losses[1] != losses[0]


def test_an_export_has_the_weights_as_they_were_and_draws_the_same(run, exact, tmp_path):
    out = convert.write(convert.open_model(run), tmp_path / "out", "safetensors", "float32")
    assert convert.open_model(out).config.train.llm_quantization == "int8"
    for path, source in native.open_native(out).part("llm").items():
        np.testing.assert_array_equal(source.read(), exact[path], strict=True)
    expected = Pipeline.load(run).draw(["a red ring"], seed=1)
    np.testing.assert_array_equal(Pipeline.load(out).draw(["a red ring"], seed=1), expected)


def test_a_run_keeps_to_what_it_began_with(run):
    with pytest.raises(ConfigError, match=r"train\.llm_quantization = 'none', was 'int8'"):
        loop.train(tiny.config(**RUN | {"train__llm_quantization": "none"}), run)


# --- what is said of it ---

BFLOAT16 = INT8 | {"train__dtype": "bfloat16", "train__frozen_dtype": "bfloat16"}
BFLOAT16 |= {"mesh__data": 2, "mesh__fsdp": 4, "optimizer__name": "adamw"}


def test_the_plan():
    none = tiny.config(**INT8 | {"train__llm_quantization": "none"})
    mesh = sharding.make_mesh()
    whole, half = (plan.describe(c, "runs/x", mesh) for c in (none, tiny.config(**INT8)))
    assert "its matrices in int8" in half and "int8" not in whole
    counts = [text.split(" LLM 3 x 16")[0].rsplit(" ", 1)[1] for text in (whole, half)]
    assert counts[0] == counts[1]  # of parameters: a scale is none


def test_the_report(monkeypatch):
    """Of its matrices half the bytes, held and gathered, of bfloat16, for the same FLOPs."""
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    none, int8 = (
        tiny.config(**BFLOAT16 | {"train__llm_quantization": method})
        for method in quantization.METHODS
    )
    mesh = sharding.make_mesh(2, 4, 1)
    arguments = [
        {
            "state": type("State", (), {"params": {}}),
            "frozen": build.abstract_frozen(config, mesh),
            "batch": program.abstract_batch(config, mesh),
        }
        for config in (none, int8)
    ]
    norms, outputs = 2 * 7 * 16, 32 + 16 + 16 + 16 + 40 + 40 + 16  # bytes; channels of a layer
    held, half = (sharding.bytes_per_device(a["frozen"]) for a in arguments)
    assert half == (held - norms) / 2 + norms + 4 * (304 + 3 * outputs)
    must = [ideal.train_step(none, a, mesh) for a in arguments]
    ids = 3 / 4 * none.train.batch_size // 2 * none.data.max_text_tokens * 4
    assert must[1]["all-gather"] - ids == (must[0]["all-gather"] - ids) / 2
    assert must[1]["reduce-scatter"] == must[0]["reduce-scatter"]  # rows of the embedding
    report = compiler.train(int8, "v5e-4")
    assert report["memory"]["frozen"] == half
    assert report["flops"]["model"] == flops.train_step(none)
    assert report["flops"]["compiled"]["llm"] == pytest.approx(report["flops"]["model"]["llm"])
    rows = [(row["kind"], row["dtype"], row["bytes"]) for row in report["collectives"]]
    gathered = sum(size for kind, dtype, size in rows if (kind, dtype) == ("all-gather", "s8"))
    assert gathered == must[1]["all-gather"] - ids


def test_another_method_is_refused():
    (problem,) = problems(changed(train__llm_quantization="int4"))
    assert problem.startswith("train.llm_quantization = 'int4' is unknown; known: ['none', 'int8']")
