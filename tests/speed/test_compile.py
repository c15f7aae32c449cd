"""The report on a step, of one that is compiled for the eight devices of the CPU."""

import jax
import pytest

from t2i_jax import build, machines, sampler, sharding
from t2i_jax.speed import compile as compiler
from t2i_jax.speed import ideal, tables
from t2i_jax.training import program
from tests import tiny


@pytest.fixture(scope="module")
def config():
    return tiny.config(llm__vocab_size=304, mesh__data=2, mesh__fsdp=4)


def report_on(config, monkeypatch):
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    return compiler.train(config, "v5e-4")


@pytest.fixture(scope="module")
def report(config):
    with pytest.MonkeyPatch.context() as patch:
        return report_on(config, patch)


def test_what_fills_the_memory(report, config):
    mesh = sharding.make_mesh(**config.mesh)
    state = program.abstract_state(config, mesh)[0]
    assert report["fits"] and report["bytes_needed"] < 1e8
    assert report["memory"]["parameters"] == sharding.bytes_per_device(state.params)
    assert report["memory"]["EMA"] == report["memory"]["parameters"]
    assert report["memory"]["optimiser"] == sharding.bytes_per_device(state.opt_state)
    side, length = config.data.image_size, config.data.max_text_tokens
    rows = config.train.batch_size // 8
    assert report["memory"]["batch"] == rows * (side * side * 3 + length * 5)
    assert all(count >= 0 for count in report["memory"].values())


def test_what_must_travel_by_the_formula(config):
    """Of one trained matrix, one vector, one frozen matrix and the embedding, by hand."""
    mesh = sharding.make_mesh(2, 4, 1)

    def like(*shape, axes):
        place = jax.NamedSharding(mesh, sharding.to_spec(axes))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=place)

    class State:
        params = {
            "matrix": like(8, 6, axes=("embed", "mlp")),
            "vector": like(5, axes=("norm",)),
        }

    frozen = {
        "llm": {
            "embed": {"weight": like(16, 3, axes=("vocab", None))},
            "blocks": {"weight": like(8, 2, axes=("embed", None))},
        }
    }
    batch = program.abstract_batch(config, mesh)
    found = ideal.train_step(config, {"state": State, "frozen": frozen, "batch": batch}, mesh)
    group = config.train.batch_size // 2 * config.data.max_text_tokens  # tokens of four devices
    assert found == pytest.approx(
        {
            "all-gather": 2 * 3 / 4 * 48 * 4 + 3 / 4 * 16 * 4 + 3 / 4 * group * 4,
            "reduce-scatter": 3 / 4 * 48 * 4 + 3 / 4 * group * 3 * 4,
            "all-reduce": 2 * 1 / 2 * 48 / 4 * 4 + 2 * 7 / 8 * 5 * 4,
        }
    )


def test_weights_are_gathered_and_activations_are_not(report):
    """As often as must be; a CPU's compiler sums whole gradients where a TPU's scatters them."""
    sizes = {"all-gather": 0.0, "all-to-all": 0.0}
    for row in report["collectives"]:
        if row["kind"] in sizes:
            sizes[row["kind"]] += row["bytes"]
    assert sizes["all-to-all"] == 0
    # Muon's products of whole momenta come on top of the weights.
    assert sizes["all-gather"] >= 0.99 * report["ideal_bytes"]["all-gather"]
    assert report["flops"]["compiled"]["llm"] == pytest.approx(report["flops"]["model"]["llm"])


def test_factors_leave_their_base_without_a_gradient(config, monkeypatch):
    """Most is gathered twice, and nothing of its size is computed for it, summed or scattered."""
    changes = {"lora.rank": 2, "optimizer.name": "adamw", "mesh.data": 1, "mesh.fsdp": 8}
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    report = report_on(config, monkeypatch)
    memory = report["memory"]
    assert memory["optimiser"] - 2 * memory["parameters"] in (4, 8)  # AdamW's counts
    base = build.abstract_params(config)[1]["base"]
    total = 4 * build.count(base)
    assert memory["parameters"] < total / 8 < memory["frozen"]
    back = sum(r["bytes"] for r in report["collectives"] if "reduce" in r["kind"])
    factors = 4 * build.count(build.abstract_params(config)[0])
    words = config.train.batch_size * config.data.max_text_tokens * config.llm.width * 4
    assert back < 2 * (factors + words) < total
    gathered = sum(r["bytes"] for r in report["collectives"] if r["kind"] == "all-gather")
    assert 1.3 * 7 / 8 * total < gathered < 1.01 * report["ideal_bytes"]["all-gather"]
    assert report["flops_ratio"] == pytest.approx(1, rel=0.02)


def test_the_report_on_drawing(config, monkeypatch):
    """What is held is what the pipeline holds; of it the DiT is gathered at every step."""
    monkeypatch.setattr(machines, "devices", lambda topology: jax.devices())
    config = config.copy_and_resolve_references().unlock()
    config.sampling.update(batch_size=5, steps=3)
    report = compiler.sample(config, "v5e-4")
    assert report["fits"] and report["batch_size"] == 8 and report["steps"] == 3
    mesh = sharding.make_mesh(**config.mesh)
    held = sampler.abstract_params(config, mesh)
    assert report["memory"]["parameters"] == sharding.bytes_per_device(held)
    matrices = [x for x in jax.tree.leaves(held) if "fsdp" in x.sharding.spec]
    gathered = 3 * 3 * sharding.bytes_per_device(matrices)  # of four parts three, in three steps
    assert report["ideal_bytes"]["all-gather"] > gathered
    found = sum(r["bytes"] for r in report["collectives"] if r["kind"] == "all-gather")
    # The compiler may take what does not change out of the loop: weights of the time's embedding.
    assert 0.75 * report["ideal_bytes"]["all-gather"] < found
    assert found < 1.01 * report["ideal_bytes"]["all-gather"]
    flops = report["flops"]
    assert flops["compiled"]["dit"] == pytest.approx(flops["model"]["dit"], rel=0.01)
    text = tables.describe(report)
    assert "tiny, sample, on v5e-4: fits" in text and "8 images in 3 steps" in text


def test_the_report_as_text(report):
    text = tables.describe(report)
    assert "on v5e-4: fits" in text and "data 2 x fsdp 4 x tensor 1" in text
    for word in ("parameters", "all-gather", "TFLOP of the model", "largest arrays"):
        assert word in text


def exhausted(text):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")

    return compiler.compile_(Lowered())


def test_what_does_not_fit_is_said_with_what_to_do(config, monkeypatch):
    done = exhausted(
        "Ran out of memory in memory space hbm. Used 33.50G of 15.75G "
        "hbm. Exceeded hbm capacity by 17.75G.\n\nTotal hbm usage >= 33.50G:"
    )
    assert done.program is None and done.needed == 33.5 * 2**30
    monkeypatch.setattr(compiler, "compile_", lambda lowered: done)
    report = report_on(config, monkeypatch)
    assert not report["fits"] and "33.50G of 15.75G" in report["problem"]
    assert [text.split(" =")[0] for text in report["suggestions"]] == [
        "dit.remat",
        "train.accumulation",
    ]
    text = tables.describe(report)
    assert "does NOT fit" in text and "19.06 GB too much" in text and "try " in text


def test_a_kernel_that_is_too_large_is_no_matter_of_activations(config, monkeypatch):
    done = exhausted("CompileTimeScopedVmemOom: Ran out of memory in memory space vmem")
    monkeypatch.setattr(compiler, "compile_", lambda lowered: done)
    report = report_on(config, monkeypatch)
    assert not report["fits"] and report["bytes_needed"] is None
    (only,) = report["suggestions"]
    assert only.startswith("train.attention = 'xla'")
    assert "it is another memory" in tables.describe(report)


def test_where_not_even_the_weights_fit_smaller_batches_are_no_way_out(config, monkeypatch):
    done = exhausted("Used 900G of 15.75G hbm")
    monkeypatch.setattr(compiler, "compile_", lambda lowered: done)
    monkeypatch.setattr(compiler, "held", lambda arguments: {"parameters": 2e10})
    config = config.copy_and_resolve_references().unlock()
    config.mesh.update(data=1, fsdp=8)
    text = " ".join(report_on(config, monkeypatch)["suggestions"])
    assert text.startswith("more devices: what is held before any activation is 20.0 GB")
    assert "lora.rank = 16" in text and "accumulation" not in text and "remat" not in text


def test_other_errors_of_the_compiler_are_raised():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compiler.compile_(Lowered())
