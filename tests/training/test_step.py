"""One training step: its randomness, its loss, its gradient, and who is left alone."""

import dataclasses
import functools

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.diffusion import time
from t2i_jax.models import autoencoder
from t2i_jax.training import step
from tests import tiny

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def run():
    return tiny.run()


@pytest.fixture(scope="module")
def sgd():
    """(state, next state, metrics) of one step of w - gradient, by the number of microbatches.

    Norms of the blocks, too, where there are several.
    """

    @functools.cache
    def stepped(accumulation):
        run = tiny.run()._replace(update=optax.sgd(1.0))
        start = run.state.replace(opt_state=run.update.init(run.state.params))
        options = {"accumulation": accumulation, "block_norms": accumulation > 1}
        function = jax.jit(run.train_step(**options))
        end, metrics = function(start, run.frozen, run.batch, KEY)
        return start, end, {name: np.asarray(value) for name, value in metrics.items()}

    return stepped


@functools.partial(jax.jit, static_argnums=0)
def loss_B(objective, params, inputs):
    return objective.loss_B(params, inputs)


def prepare(run, key=KEY, **changes):
    return jax.jit(run.objective.prepare)(run.frozen, run.batch | changes, key)


def test_latents_noise_and_times_are_what_they_are_said_to_be(run):
    inputs = prepare(run)
    np.testing.assert_allclose(inputs["latents"], run.batch["image"] / 127.5 - 1, atol=1e-6)
    assert np.ptp(inputs["latents"]) == pytest.approx(2)
    noise = np.asarray(inputs["noise"])
    assert noise.shape == inputs["latents"].shape
    assert abs(noise.mean()) < 0.03 and noise.std() == pytest.approx(1, abs=0.03)
    flow = run.config.flow
    assert np.isin(inputs["t"], time.training_sigmas(flow.num_timesteps, flow.shift)).all()
    assert len(np.unique(inputs["t"])) > 10  # a time for each row
    np.testing.assert_array_equal(inputs["features"].mask_BT, run.batch["mask"])


def test_the_encoders_program_gives_what_is_drawn_from(run):
    """In any number of parts; and of it the very latents that the images give."""
    net = autoencoder.AutoencoderKL(2, (8, 16), 1, 4)
    kl = autoencoder.Autoencoder(net, scale=1.5, shift=0.1)
    params = meta.unbox(kl.init(jax.random.key(0)))
    image = run.batch["image"]
    moments = jax.jit(step.make_encode(kl))(params, image)
    posterior = kl.posterior(params, image / 127.5 - 1.0)
    np.testing.assert_allclose(moments[..., :2], posterior.mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(moments[..., 2:], posterior.logvar, rtol=0, atol=1e-5)
    halves = jax.jit(step.make_encode(kl, 2))(params, image)
    np.testing.assert_allclose(halves, moments, rtol=0, atol=1e-5)
    objective = dataclasses.replace(run.objective, autoencoder=kl)
    frozen = {"autoencoder": params}
    drawn = [
        objective.latents(frozen, batch, KEY) for batch in ({"image": image}, {"moments": moments})
    ]
    np.testing.assert_allclose(*drawn, rtol=0, atol=1e-5)
    assert drawn[0].std() > 0.5


def test_randomness_is_a_function_of_key_and_step_alone(run, sgd):
    drawn = [prepare(run), prepare(run, image=run.batch["image"][::-1])]
    for name in ("noise", "t"):
        np.testing.assert_array_equal(*[inputs[name] for inputs in drawn])
    other = prepare(run, jax.random.key(4))
    assert (np.asarray(other["noise"]) != drawn[0]["noise"]).mean() > 0.99
    start, _, metrics = sgd(1)
    inputs = prepare(run, jax.random.fold_in(KEY, start.step))
    loss = loss_B(run.objective, start.params, inputs).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    later = prepare(run, jax.random.fold_in(KEY, start.step + 1))
    assert (np.asarray(later["noise"]) != inputs["noise"]).mean() > 0.99


def test_the_loss_is_the_mean_squared_error_of_the_velocity(run):
    inputs, params = prepare(run), run.state.params
    whole = {**params, "llm": run.frozen["llm"]}
    t = np.asarray(inputs["t"])[:, None, None, None]
    z = (1 - t) * np.asarray(inputs["latents"]) + t * np.asarray(inputs["noise"])
    text = run.batch["ids"], run.batch["mask"]
    v = jax.jit(run.objective.model.apply)({"params": whole}, z, inputs["t"], *text)
    target = np.float64(inputs["noise"]) - np.float64(inputs["latents"])
    expected = np.square(v - target).mean((1, 2, 3))
    tiny.close(loss_B(run.objective, params, inputs), expected)


def test_the_step_takes_the_gradient_and_reports_it(run, sgd):
    start, end, metrics = sgd(1)
    inputs = prepare(run, jax.random.fold_in(KEY, 0))
    grads = jax.jit(jax.grad(lambda p: run.objective.loss_B(p, inputs).mean()))(start.params)
    tiny.close(jax.tree.map(jnp.subtract, start.params, end.params), grads, 1e-4)

    def norm(tree):
        return np.sqrt(sum(np.square(np.float64(x)).sum() for x in jax.tree.leaves(tree)))

    assert metrics.keys() == {"loss", "grad_norm", "param_norm", "update_norm", "learning_rate"}
    assert metrics["grad_norm"] == pytest.approx(norm(grads), rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(norm(grads), rel=1e-5)
    assert metrics["param_norm"] == pytest.approx(norm(end.params), rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(run.rate(0))
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
    assert end.step == 1
    assert all(np.asarray(x).any() for x in jax.tree.leaves(grads))  # all is trained


def test_accumulation_changes_nothing(sgd):
    (_, end, metrics), (_, same_end, same) = sgd(1), sgd(4)
    assert same["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert same["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    tiny.close(same_end.params, end.params)


def test_norms_of_the_blocks(sgd):
    (_, _, plain), (start, end, metrics) = sgd(1), sgd(4)
    assert metrics.keys() - plain.keys() == {f"{n}_norm/block" for n in ("grad", "param", "update")}
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, end.params, start.params)

    def norms(params):
        stacked = [x for p, x in flatten_dict(params).items() if p[:2] == ("dit", "blocks")]
        return [np.sqrt(sum(np.square(np.float64(x[i])).sum() for x in stacked)) for i in (0, 1)]

    np.testing.assert_allclose(metrics["param_norm/block"], norms(end.params), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm/block"], norms(moved), rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm/block"], norms(moved), rtol=1e-4)


def test_microbatches_are_rows_taken_in_turn():
    """Rows 0, 4, 8, ... make the first of four: every shard of the batch has some in each."""
    run = tiny.run()
    inputs = jax.eval_shape(run.objective.prepare, run.frozen, run.batch, KEY)
    numbered = jax.tree.map(lambda x: np.zeros(x.shape, np.int32), inputs)
    numbered["t"] = np.arange(16)
    keys = numbered["features"].keys_LBTKH
    keys[...] = np.arange(16)[:, None, None, None]
    parts = step.split_batch(numbered, 4)
    for i in range(4):
        rows = [i, 4 + i, 8 + i, 12 + i]
        np.testing.assert_array_equal(parts["t"][i], rows)
        np.testing.assert_array_equal(parts["features"].keys_LBTKH[i, 2, :, 0, 0, 0], rows)
    assert parts["features"].keys_LBTKH.shape == (4, 3, 4, *keys.shape[2:])
    assert parts["features"].hidden_BTD.shape == (4, 4, *inputs["features"].hidden_BTD.shape[1:])


def test_nothing_frozen_is_trained(run):
    """No gradient reaches the LLM, though it matters; no state is kept for it."""

    @jax.jit
    @jax.value_and_grad
    def loss(frozen):
        inputs = run.objective.prepare(frozen, run.batch, KEY)
        return run.objective.loss_B(run.state.params, inputs).mean()

    llm = {"llm": run.frozen["llm"]}
    value, grads = loss(llm)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads))
    assert abs(loss(jax.tree.map(lambda x: 0.5 * x, llm))[0] - value) > 1e-4
    assert run.state.params.keys() == run.state.ema.keys() == {"dit"}
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(run.state)]
    assert not any("llm" in path for path in paths)


def test_adamw_and_average_go_through_the_step():
    """Two steps: AdamW's move by about the rate, the average (every 2) is of the second."""
    run = tiny.run(optimizer__name="adamw", optimizer__weight_decay=0.0, optimizer__warmup_steps=0)
    function = jax.jit(run.train_step())
    first, _ = function(run.state, run.frozen, run.batch, KEY)
    second, metrics = function(first, run.frozen, run.batch, KEY)
    moves = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), first.params, run.state.params)
    for path, move in flatten_dict(moves, sep="/").items():
        assert np.median(move) == pytest.approx(2e-3, rel=0.01), path
    tiny.equal(first.ema, run.state.ema)
    mixed = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, run.state.ema, second.params)
    tiny.close(second.ema, mixed)
    assert metrics["learning_rate"] == pytest.approx(2e-3)


def test_validation_is_the_loss_at_fixed_times(run):
    times = (0.1, 0.8)
    losses = jax.jit(step.make_validation(run.objective, times))(
        run.state.params, run.frozen, run.batch, KEY
    )
    inputs = prepare(run)
    fixed = [{**inputs, "t": jnp.full(16, t)} for t in times]
    expected = [loss_B(run.objective, run.state.params, x).mean() for x in fixed]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_one_row_that_is_asked_to_stop_stops_all(run):
    train_step, key = jax.jit(run.train_step()), KEY
    rows = len(run.batch["ids"])
    for asked in ([], [3]):
        stop = np.zeros(rows, np.int32)
        stop[asked] = 1
        _, metrics = train_step(run.state, run.frozen, {**run.batch, "stop": stop}, key)
        assert int(metrics["stop"]) == len(asked)
    _, plain = train_step(run.state, run.frozen, run.batch, key)
    assert "stop" not in plain and float(plain["loss"]) == float(metrics["loss"])
