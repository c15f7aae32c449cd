"""The loop: what a run writes, how it goes on, and when it refuses to."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2i_jax import build, checkpoint, frozen
from t2i_jax import config as configs
from t2i_jax.data import loader, sources
from t2i_jax.errors import ConfigError
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import held_out, loop, program, state, step, workdir
from t2i_jax.training.metrics import read_metrics
from t2i_jax.training.watchdog import Watchdog
from tests import tiny


def test_a_run_leaves_what_it_promises(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        *(
            "bad_samples",
            "checkpoints",
            "config.json",
            "data.json",
            "history.jsonl",
            "llm",
            "loss.png",
            "metrics.jsonl",
        ),
        *("profile", "samples", "speed.jsonl", "tensorboard", "tokenizer"),
    }
    assert checkpoint.find(trained)[1] == 4
    assert [p.name for p in (trained / "samples").iterdir()] == ["step_0000004.png"]
    assert Image.open(trained / "samples" / "step_0000004.png").width > 3 * 16
    entries = read_metrics(trained)
    kinds = [(e["step"], "loss" if "loss" in e else "validation_loss") for e in entries]
    expected = [(1, "loss"), (2, "loss"), (2, "validation_loss"), (3, "loss"), (4, "loss")]
    assert kinds == [*expected, (4, "validation_loss")]
    assert all(math.isfinite(value) for entry in entries for value in entry.values())


def test_the_validation_loss_is_of_the_average_on_the_held_out_samples(trained):
    entry = read_metrics(trained)[-1]
    config = tiny.config(**tiny.WATCHED)
    by_time = [entry[f"validation_loss_t{t:g}"] for t in config.validation.timesteps]
    assert entry["validation_loss"] == pytest.approx(np.mean(by_time))
    pipeline = Pipeline.load(trained)
    objective = step.Objective(pipeline.model, pipeline.autoencoder, **config.flow)
    source = sources.make_source(config, "validation")
    held_out = loader.Loader(source, pipeline.prompts, config.data, 16, config.seed)
    key = jax.random.fold_in(jax.random.key(config.seed), state.Stream.VALIDATION)

    @jax.jit
    def losses(params, frozen, batch):
        inputs = objective.prepare(frozen, batch, jax.random.fold_in(key, 0))
        times = [jnp.full(16, t) for t in config.validation.timesteps]
        return [objective.loss_B(params, {**inputs, "t": t}).mean() for t in times]

    batch = held_out.fixed_batch(range(16)).arrays
    host = jax.tree.map(np.asarray, (pipeline.params, pipeline.frozen))
    np.testing.assert_allclose(losses(*host, batch), by_time, rtol=1e-4)


@pytest.mark.parametrize(
    "count, batch_size, shards, sizes",
    [
        (16, 8, 4, [8, 8]),
        (19, 8, 4, [8, 8]),  # three rows divide over no four shards
        (22, 8, 2, [8, 8, 6]),
        (5, 8, 1, [5]),
        (5, 8, 4, [4]),
        (9, 10, 4, [8]),
    ],
)
def test_validation_leaves_out_what_does_not_divide(count, batch_size, shards, sizes):
    assert held_out.validation_sizes(count, batch_size, shards) == sizes


def test_a_finished_run_has_nothing_to_do(trained):
    before = (trained / "metrics.jsonl").read_text()
    final = loop.train(tiny.config(**tiny.WATCHED), trained)
    assert final.step == 4
    assert (trained / "metrics.jsonl").read_text() == before


class Counted:
    """A source as `claim` sees it."""

    fingerprint = "f00"

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length


def poisoned(number):
    """`make_train_step`, but everything that comes out of step `number` is not a number."""
    make = step.make_train_step

    def make_poisoned(*args, **options):
        inner = make(*args, **options)

        def function(current, *inputs):
            bad = current.step == number - 1
            after, metrics = inner(current, *inputs)
            spoil = lambda x: jnp.where(bad, jnp.nan, x)  # noqa: E731
            params = jax.tree.map(spoil, after.params)
            return after.replace(params=params), jax.tree.map(spoil, metrics)

        return function

    return make_poisoned


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(trained, tmp_path, monkeypatch, capsys):
    """Resumed at step 4 for six more; step 6, when a checkpoint is due, is not a number."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(step, "make_train_step", poisoned(6))
    unwatched = {"train__steps": 10, "validation__every": 0, "sampling__every": 0}
    config = tiny.config(**tiny.WATCHED | unwatched)
    with pytest.raises(loop.NonFiniteError, match=r"Step 6: loss nan, gradient norm nan") as error:
        loop.train(config, workdir)
    assert "optimizer.learning_rate" in str(error.value)
    assert "resumed at step 4 of 10" in capsys.readouterr().out
    with checkpoint.Checkpoints(workdir) as saved:
        assert saved.steps() == [2, 4]
    steps = [entry["step"] for entry in read_metrics(workdir) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5]


def test_another_config_is_refused(trained):
    config = tiny.config(**tiny.WATCHED, optimizer__b1=0.8, dit__width=32, train__steps=9)
    with pytest.raises(ConfigError, match="holds a run of another config") as error:
        loop.train(config, trained)
    assert "optimizer.b1 = 0.8, was 0.9" in str(error.value)
    assert "dit.width = 32, was 24" in str(error.value)
    assert "train.steps" not in str(error.value)


def test_another_length_is_refused_where_the_schedule_ends_with_it(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    linear = tiny.config(**tiny.WATCHED, optimizer__schedule="linear")
    (workdir / "config.json").write_text(configs.to_json(linear))
    longer = tiny.config(**tiny.WATCHED, optimizer__schedule="linear", train__steps=9)
    with pytest.raises(ConfigError, match=r"train\.steps = 9, was 4"):
        loop.train(longer, workdir)


def test_a_language_model_of_another_origin_is_refused(trained):
    config = tiny.config(**tiny.WATCHED, weights__llm="elsewhere", weights__tokenizer="elsewhere")
    with pytest.raises(ConfigError, match=r"weights\.llm = 'elsewhere', was ''"):
        workdir.claim(config, trained, Counted(1_000_000))


def test_data_that_grew_is_refused(trained):
    was = json.loads((trained / "data.json").read_text())
    assert was["samples"] == 1_000_000 and was["fingerprint"]
    with pytest.raises(ConfigError, match="1000000 training samples, now there are 1000001"):
        workdir.claim(tiny.config(**tiny.WATCHED), trained, Counted(1_000_001))


def test_a_directory_in_which_nothing_was_made_is_free(tmp_path):
    workdir.claim(tiny.config(), tmp_path, Counted(5))
    workdir.claim(tiny.config(seed=3), tmp_path, Counted(6))
    (tmp_path / "llm").mkdir()
    with pytest.raises(ConfigError, match="seed = 42, was 3"):
        workdir.claim(tiny.config(), tmp_path, Counted(6))


def test_a_language_model_that_diverges_is_not_kept(tmp_path, monkeypatch):
    """And while it is trained, the watchdog watches."""
    watched = []
    monkeypatch.setattr(
        Watchdog, "expect", lambda self, what, *, pause=False: watched.append((what, pause))
    )
    config = tiny.config(pretrain__learning_rate=1e30)
    with pytest.raises(loop.NonFiniteError, match=r"pretrain\.learning_rate"):
        loop.train(config, tmp_path / "run")
    assert not frozen.llm_path(tmp_path / "run").exists()
    assert watched == [("the tokenizer", True), ("pre-training the language model", True)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__batch_size": 12}, r"train\.batch_size = 12 does not divide over 8 shards"),
        ({"train__accumulation": 4}, r"over 8 shards .* in 4 microbatch"),
        (
            {"validation__every": 1, "data__validation_size": 7},
            r"data\.validation_size = 7 is less than",
        ),
        ({"mesh__fsdp": 3}, r"\(-1, 3, 1\) does not fit 8 devices"),
        (
            {"mesh__tensor": 8},
            r"tensor = 8 does not divide llm\.num_heads = 4: .* What divides is 1, 2, 4\.",
        ),
    ],
)
def test_what_does_not_divide_is_said_before_anything_is_made(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.train(tiny.config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_speed_is_written_beside_what_is_learnt(trained):
    """Of every step but the first, which compiles; pauses are told, and no part of a step."""
    lines = [json.loads(line) for line in (trained / "speed.jsonl").read_text().splitlines()]
    learnt = read_metrics(trained)
    assert [line["step"] for line in lines] == [e["step"] for e in learnt if "loss" in e][1:]
    for line in lines:
        assert line["seconds_per_step"] > 0 and 0 <= line["data_wait"] <= 1
        assert 0 < line["goodput"] < 1 and line["tflops"] > 0
        assert not {*line} & {"loss", "grad_norm"}
    assert any("pause_validation" in line for line in lines)


def test_norms_of_the_blocks_are_numbers_of_their_own(trained):
    for entry in (e for e in read_metrics(trained) if "loss" in e):
        for name in ("grad_norm", "param_norm", "update_norm"):
            blocks = [entry.pop(f"{name}/block_{i:02d}") for i in range(2)]
            assert math.hypot(*blocks) < entry[name]
            assert entry["step"] == 1 or min(blocks) > 0  # AdaLN-Zero: no gradient at first
        assert not any("/block" in key for key in entry)


LONGEST = (33, 30, 35)  # tokens of the batches of the three steps, by the tokenizer of this run
ROWS = 2  # of a device
MLP = rf"f32\[{ROWS},(\d+),{tiny.LLM['mlp_width']}\]"  # the only arrays of this width


def random_params(config, mesh, like):
    """All of them nonzero, so that the loss of the first step depends on the text already."""
    params = tiny.params(build.model(config))
    trained = {name: params[name] for name in like}
    return jax.device_put(trained, jax.tree.map(lambda x: x.sharding, like))


class Programs:
    """Stands for the step of a run: compiles it for each length, and notes what is run.

    Attributes:
      run: of every step (lengths of the LLM's arrays, FLOPs) in the program.
    """

    def __init__(self, train_step):
        self._train_step, self._compiled, self.run = train_step, {}, []

    def __call__(self, *args):
        shape = args[2]["ids"].shape
        if shape not in self._compiled:
            self._compiled[shape] = self._train_step.lower(*args).compile()
        step = self._compiled[shape]
        lengths = {int(length) for length in re.findall(MLP, step.as_text())}
        self.run.append((lengths, step.cost_analysis()["flops"]))
        return step(*args)


@pytest.fixture
def train(monkeypatch, tmp_path, trained):
    """(*text_buckets) -> (metrics of a run, Programs.run)."""
    monkeypatch.setattr(loop, "first_params", random_params)
    make = program.make

    def with_buckets(*lengths):
        seen = []

        def watched(*args):
            made = make(*args)
            seen.append(Programs(made.train_step))
            return made._replace(train_step=seen[0])

        monkeypatch.setattr(program, "make", watched)
        sizes = {"data__text_buckets": lengths, "data__max_text_tokens": 40}
        config = tiny.config(train__steps=3, checkpoint__every=3, optimizer__name="adamw", **sizes)
        workdir = tmp_path / f"run_{len(lengths)}"
        for part in ("tokenizer", "llm"):
            shutil.copytree(trained / part, workdir / part)
        loop.train(config, workdir)
        return read_metrics(workdir), seen[0].run

    return with_buckets


def test_cut_texts_give_the_same_run_for_less(train):
    whole, programs = train()
    assert [lengths for lengths, _ in programs] == [{40}] * 3
    metrics, cut = train(33)
    assert [lengths for lengths, _ in cut] == [{33 if n <= 33 else 40} for n in LONGEST]
    for (lengths, flops), (_, all_of_them) in zip(cut, programs, strict=True):
        assert flops < 0.95 * all_of_them if lengths == {33} else flops == all_of_them
    for one, other in zip(metrics, whole, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, err_msg=name)
