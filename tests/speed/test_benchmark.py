"""What is measured: the programs of training and sampling, on eight devices."""

import sys

import numpy as np
import pytest

from t2i_jax import build, flops
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.models import autoencoder as autoencoders
from t2i_jax.speed import autoencoder, hlo, sample, startup, step, train
from tests import tiny, toys
from tests.clock import Clock


class Ticking(Clock):
    """Half a second passes whenever it is looked at."""

    def __call__(self):
        self.now += 0.5
        return self.now


@pytest.fixture
def small_autoencoder(monkeypatch):
    monkeypatch.setattr(
        build, "make_autoencoder", lambda c: autoencoders.make(**c.autoencoder, net=toys.VAE)
    )


def test_the_training_step(small_autoencoder):
    """With the autoencoder's program before it."""
    sizes = {"mesh__data": 2, "mesh__fsdp": 4, "train__batch_size": 16, "data__image_size": 16}
    config = toys.config("fusion_2b", **sizes)
    found = train.measure(config, 3, clock=Ticking())
    assert found["devices"] == 8 and found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # A step took half a second, so two are in a round, which took half a second.
    assert found["seconds"] == {"median": 0.25, "least": 0.25, "most": 0.25, "rounds": 3}
    assert found["images_per_second"] == config.train.batch_size / 0.25
    work = sum(flops.train_step(config).values())
    assert found["tflops_per_device"] == pytest.approx(work / 8 / 0.25 / 1e12, rel=1e-3)
    assert found["compile_seconds"] == 0.5 and found["planned_bytes"] > 1e5
    text = train.describe(found)
    assert "64 images/s" in text and "8 x cpu: data 2 x fsdp 4 x tensor 1" in text


def test_a_loss_that_is_no_number_is_no_measurement(monkeypatch):
    monkeypatch.setattr(train.Step, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(train.Step, "times", lambda self, *args: None)
    monkeypatch.setattr(train.Step, "loss", float("nan"))
    with pytest.raises(UserError, match="its time means nothing"):
        train.measure(tiny.config(), 1)


def test_sampling_with_and_without_the_memory(monkeypatch):
    """The same pictures; and without it, the language model runs for both halves at every step."""
    config = tiny.config(mesh__data=2, mesh__fsdp=4, llm__vocab_size=304)
    kept = {}
    monkeypatch.setattr(
        sample,
        "compiled",
        lambda *args, f=sample.compiled, **kw: kept.update(f(*args, **kw)) or kept,
    )
    found = sample.measure(config, 1, recompute=True)
    images = {way: np.asarray(run(*given), int) for way, (run, given) in kept.items()}
    assert images["cached"].shape == (8, 16, 16, 3) and images["cached"].std() > 1
    assert np.abs(images["cached"] - images["recomputed"]).max() <= 1
    assert found["steps"] == 3 and found["guided"]
    read = {way: hlo.Program(run.as_text()).flops()["llm"] * 8 for way, (run, _) in kept.items()}
    one = flops.forward(config)["llm"]
    assert read["recomputed"] == pytest.approx(3 * 16 * one)
    assert read["cached"] < read["recomputed"] / 2
    work = sum(flops.sample(config, 8, 3).values())
    ratio = (work + (3 * 16 - 9) * one) / work
    assert found["recomputed"]["flop_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert f"by FLOPs {ratio:.3f} x" in sample.describe(found)


def test_the_autoencoder(small_autoencoder):
    config = toys.config("fusion_2b", sampling__batch_size=8, data__image_size=16)
    found = autoencoder.measure(config, 1)
    assert found["image_size"] == 16 and found["batch_size"] == 8
    for way in ("encode", "decode"):
        seconds = found[way]["seconds"]["median"]
        assert found[way]["images_per_second"] == pytest.approx(8 / seconds, rel=1e-2)
        assert found[way]["tflop"] == pytest.approx(8 * flops.forward(config)[way] / 1e12, rel=1e-3)
        assert f"  {way}: " in autoencoder.describe(found)


def test_the_sizes_of_the_step():
    for size, (batch, side, width, layers) in step.SIZES.items():
        config = step.config_of(size)
        assert build.model(config).dit.num_heads * config.llm.head_width == width
        assert (config.train.batch_size, config.data.image_size) == (batch, side)
        assert config.llm.num_layers == config.dit.num_layers == layers
        step.plain.check(config)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ConfigError, match="works on pixels"):
        autoencoder.measure(tiny.config())
    with pytest.raises(ConfigError, match="--batch_size=3 must be a multiple of the 8 shards"):
        sample.measure(tiny.config(), batch_size=3)
    with pytest.raises(ConfigError, match="known are small, medium, large"):
        step.measure(1, ("huge",))


RUN = """
import json, os, pathlib, sys, time
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
programs = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
assert os.environ["JAX_LOG_COMPILES"] == "1" and sys.argv[1] == "--config=x"
workdir.mkdir(exist_ok=True)
print(" a device  parameters", flush=True)
seconds = 0.25 if programs.exists() else 4.0
programs.mkdir(exist_ok=True)
print(f"Finished XLA compilation of jit(f) in {seconds} sec", file=sys.stderr)
print("Finished XLA compilation of jit(train_step) in 1.5e+00 sec", file=sys.stderr, flush=True)
(workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\\n')
with (workdir / "history.jsonl").open("a") as file:
    for event in ("start", "ready"):
        file.write(json.dumps({"event": event, "step": 0, "time": time.time()}) + "\\n")
time.sleep(100)
"""


def test_starts_of_processes():
    found = startup.measure([sys.executable, "-c", RUN, "--config=x"], 2)
    assert found["same"] and found["cold"]["seconds"]["rounds"] == 2
    assert found["cold"]["parts"]["compile"] == 5.5 and found["warm"]["parts"]["compile"] == 1.75
    assert found["warm"]["parts"]["programs"] == 2
    assert 0 < found["cold"]["seconds"]["median"] < 100
    assert "bit by bit" in startup.describe(found)


def test_a_start_that_fails_says_what_it_said():
    with pytest.raises(UserError, match="before its first step:\nno weights"):
        startup.measure([sys.executable, "-c", "import sys; sys.exit('no weights')"], 1)


def test_bounds_can_be_required():
    found = {"what": "step", "small": {"ratio": 0.93}, "large": {"ratio": 1.1}}
    step.require(found, 1.2)
    with pytest.raises(UserError, match=r"slower than --require=1.05 allows: \{'large': 1.1\}"):
        step.require(found, 1.05)
    starts = {way: {"seconds": {"median": took}} for way, took in (("cold", 30.0), ("warm", 9.0))}
    startup.require(starts | {"same": True}, 60.0, None)
    with pytest.raises(UserError, match=r"A warm start took 9\.0 s, more than --require_warm=8"):
        startup.require(starts | {"same": True}, 60.0, 8.0)
    with pytest.raises(UserError, match="first steps of the starts differ"):
        startup.require(starts | {"same": False}, None, None)


def test_a_step_by_hand_beside_ours_as_it_is_measured(monkeypatch):
    """At the smallest size, for a moment."""
    monkeypatch.setitem(step.SIZES, "small", (2, 8, 64, 1))
    monkeypatch.setattr(step, "_SECONDS", 0.0)
    monkeypatch.setattr(step, "config_of", smallest(step.config_of))
    found = step.measure(4, ("small",))
    low, high = found["small"]["ratio_interval"]
    assert low <= found["small"]["ratio"] <= high
    assert found["small"]["framework"]["seconds"]["rounds"] == 4
    assert "(95%: " in step.describe(found)


def smallest(config_of):
    def changed(size):
        config = config_of(size).unlock()
        config.llm.update(num_heads=2, num_kv_heads=1)
        return config.lock()

    return changed
