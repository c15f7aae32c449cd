"""Runs that train low-rank factors: what they store, draw and export, and what they refuse."""

import dataclasses
import shutil

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import base_model, build, checkpoint, convert
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.models import lora
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop
from tests import tiny, toys

PROMPTS = ["a red ring", "two blue squares"]


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """A model like the finished run's, with random weights: trained gates would be almost zero."""
    model, rng = convert.open_source(str(trained)), np.random.default_rng(0)
    weights = {
        path: toys.Memory(0.3 * rng.standard_normal(source.shape, np.float32))
        for path, source in model.weights.items()
        if path.startswith("dit/")
    }
    whole = dataclasses.replace(model, weights={**model.weights, **weights})
    out = tmp_path_factory.mktemp("lora") / "base"
    return convert.write(whole, out, "safetensors", "float32")


def config(base, **changes):
    """Factors of rank 3, trained fast enough to be seen after four steps."""
    parts = dict.fromkeys(("weights__start", "weights__llm", "weights__tokenizer"), str(base))
    how = {"lora__rank": 3, "lora__alpha": 6.0, "optimizer__name": "adamw"}
    rate = {"optimizer__learning_rate": 0.05, "optimizer__warmup_steps": 0}
    return tiny.config(**parts | how | rate | tiny.WATCHED | changes)


@pytest.fixture(scope="module")
def run(base):
    """(Working directory, last state) of a run that draws and validates."""
    workdir = base.parent / "run"
    return workdir, loop.train(config(base), workdir)


def unmerged(run, base):
    """The run's pipeline as it draws in training: base and factors side by side."""
    workdir, last = run
    c, plain = config(base), Pipeline.load(base)
    like = build.abstract_frozen(c, plain.mesh)["base"]
    params = loop.load_base(c, workdir, like, new=False)
    return plain, plain._replace(config=c, params=last.ema, frozen={**plain.frozen, "base": params})


def test_a_checkpoint_holds_factors_alone(run, base):
    workdir, last = run
    with checkpoint.Checkpoints(workdir) as saved:
        found = saved.arrays(4, "params")
        tiny.equal(found, flatten_dict(jax.tree.map(np.asarray, last.params), sep="/"))
    assert all(path.rpartition("/")[2] in ("a", "b") for path in found)
    trained, _ = build.abstract_params(config(base))
    assert sum(x.size for x in found.values()) == build.count(trained)
    assert (workdir / "samples" / "step_0000004.png").exists()


def test_the_first_step_starts_from_the_base_and_leaves_it():
    """The loss is the base's, and B alone moves, because the gradient of A is zero."""
    run = tiny.run(lora__rank=3, optimizer__name="adamw", optimizer__weight_decay=0.0)
    first = lora.init(jax.random.key(0), run.boxed)
    start = run.state.replace(params=first, opt_state=run.update.init(first))
    before = jax.tree.map(np.asarray, (first, run.frozen))
    step = jax.jit(run.train_step(), donate_argnums=0)
    after, metrics = step(start, run.frozen, run.batch, jax.random.key(1))
    tiny.equal(run.frozen, before[1])
    old, new = flatten_dict(before[0]), flatten_dict(after.params)
    for path, x in new.items():
        assert (np.asarray(x) != old[path]).any() == (path[-1] == "b"), path
    plain = tiny.run(lora__rank=0)
    inputs = jax.jit(plain.objective.prepare)(
        run.frozen, run.batch, jax.random.fold_in(jax.random.key(1), 0)
    )
    loss = jax.jit(lambda p: jnp.mean(plain.objective.loss_B(p, inputs)))(run.frozen["base"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


def test_pictures_of_the_merged_model_are_the_runs(run, base):
    plain, factored = unmerged(run, base)
    wanted = factored.draw(PROMPTS, seed=3).astype(int)
    merged = Pipeline.load(run[0])
    assert not merged.config.lora.rank and merged.params.keys() == plain.params.keys()
    found = merged.draw(PROMPTS, seed=3).astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert np.abs(found - plain.draw(PROMPTS, seed=3)).mean() > 5  # and not the base's


def test_an_export_is_the_merged_model(run, tmp_path):
    model = convert.open_source(str(run[0]))
    out = convert.write(model, tmp_path / "out", "safetensors", "float32")
    assert convert.differences(convert.open_model(out), model) == []
    tiny.equal(Pipeline.load(out).params, Pipeline.load(run[0]).params)
    c = convert.open_model(out).config
    assert (c.lora.rank, c.weights.start) == (0, "")


@pytest.mark.parametrize("layout", convert.FORMATS)
def test_every_format_takes_what_is_merged(tmp_path, layout):
    model = toys.model("ablations/baseline", tmp_path / "source")
    c = model.config.copy_and_resolve_references().unlock()
    c.lora.rank = 2
    pairs = flatten_dict(build.abstract_params(c)[0], sep="/")
    rng = np.random.default_rng(0)
    factors = {p: rng.standard_normal(x.value.shape).astype(np.float32) for p, x in pairs.items()}
    watched = base_model.watch(model, tmp_path, new=True)
    merged = base_model.merge(watched, factors, 0.5)
    whole = dataclasses.replace(model, weights={**model.weights, **merged})
    again = convert.open_model(convert.write(whole, tmp_path / "out", layout, "float32"))
    path = "dit/blocks/attention_out"
    a, b = factors[f"{path}/a"], factors[f"{path}/b"]
    wanted = model.weights[f"{path}/weight"].read() + 0.5 * np.einsum("lnhr,lro->lnho", a, b)
    np.testing.assert_allclose(again.weights[f"{path}/weight"].read(), wanted, atol=1e-5)
    kept = "dit/patch_embed/weight"
    np.testing.assert_array_equal(again.weights[kept].read(), model.weights[kept].read())


def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, base, tmp_path):
    for steps in (2, 4):
        last = loop.train(config(base, train__steps=steps), tmp_path / "run")
    tiny.equal(last, run[1])


def test_without_its_base_nothing_is_done(run, base, tmp_path):
    workdir, moved = run[0], base.with_name("elsewhere")
    base.rename(moved)
    try:
        for act in (
            lambda: Pipeline.load(workdir),
            lambda: convert.open_model(workdir),
            lambda: loop.train(config(moved, weights__start=str(base)), tmp_path / "new"),
            lambda: loop.train(config(moved, weights__start=str(base)), workdir),
        ):
            with pytest.raises(MissingError, match=r"weights\.start = .*base'?: no such directory"):
                act()
    finally:
        moved.rename(base)


def test_another_base_is_refused(run, base, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    with pytest.raises(ConfigError, match=r"is not the model that .* trains factors for"):
        loop.train(config(base, weights__start=str(trained), train__steps=5), workdir)
    (workdir / "base.json").unlink()
    with pytest.raises(MissingError, match=r"base\.json is not there"):
        Pipeline.load(workdir)
