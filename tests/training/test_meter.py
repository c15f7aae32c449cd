"""Speed, by a clock that the test sets."""

from types import SimpleNamespace

from etils import epath
import numpy as np
import pytest

from t2i_jax import flops, jsonlines, sharding
from t2i_jax.data.bad import Cause
from t2i_jax.training.meter import Meter
from t2i_jax.training.metrics import SPEED
from t2i_jax.training.watch import Watch
from tests import tiny
from tests.clock import Clock


def batch(length, name):
    """What a loader gives, as far as the meter looks at it."""
    return SimpleNamespace(arrays={"ids": np.zeros((2, length), np.int32), name: None})


@pytest.fixture
def clock():
    return Clock()


def test_a_line_is_of_the_steps_since_the_last_one(clock):
    config = tiny.config()
    meter = Meter(config, 8, clock)
    assert meter.read() == {}

    def data():
        for waited, length, name in (
            (50.0, 16, "image"),
            (0.5, 16, "image"),
            (1.5, 8, "moments"),  # a mixture may have stored latents, and texts of any length
            (0.0, 16, "image"),
        ):
            clock.now += waited
            yield batch(length, name)

    batches = meter.batches(data())
    next(batches)
    clock.now += 30  # compiles
    meter.step(meter.work)
    assert meter.read() == {}
    for _ in range(2):
        next(batches)
        clock.now += 3
        meter.step(meter.work)
    with meter.pause("validation"):
        clock.now += 7
    line = meter.read()
    first = flops.train_step(config, 16)
    second = flops.train_step(config, 8, latents=True)
    assert second.keys() < first.keys() and second["llm"] < first["llm"]
    both = sum(first.values()) + sum(second.values())
    assert line == pytest.approx(
        {
            "seconds_per_step": 4.0,
            "images_per_second": config.train.batch_size / 4,
            "tflops": both / 8 / 8 / 1e12,
            "data_wait": 2 / 8,
            "pause_validation": 7.0,
        }
    )
    next(batches)
    clock.now += 2
    meter.step(meter.work)
    assert meter.read()["seconds_per_step"] == 2.0
    assert list(batches) == []


def test_a_line_has_the_work_of_its_own_step(clock, tmp_path):
    """`Watch` looks at a step when the batch after it, of another length, is handed out already."""
    config, mesh = tiny.config(), sharding.make_mesh()
    loader = SimpleNamespace(left_out=())
    parts = SimpleNamespace(
        config=config, workdir=epath.Path(tmp_path), mesh=mesh, train_loader=loader, damage=()
    )
    watch = Watch(parts, 0, lambda: 0.5)
    watch.meter = Meter(config, mesh.size, clock)
    kinds = ((16, "image"), (8, "moments"), (16, "image"), (8, "image"))  # of train.steps
    metrics = dict.fromkeys(("loss", "grad_norm", "update_norm"), np.float32(1.0))
    batches = watch.meter.batches(batch(*kind) for kind in kinds)
    for number, _ in enumerate(batches, 1):
        clock.now += 2.0
        watch.dispatched(number, {**metrics, "bad": np.zeros(len(Cause), int)}, ())
        if number == 1:
            watch.settle()  # as the loop does: it has compiled
    watch.settle()
    watch.leave()
    lines = jsonlines.read(tmp_path / SPEED)
    assert [line["step"] for line in lines] == [2, 3, 4]
    for line, (length, name) in zip(lines, kinds[1:], strict=True):
        work = flops.train_step(config, length, latents=name == "moments")
        done = line["tflops"] * line["seconds_per_step"] * 1e12
        assert done == pytest.approx(sum(work.values()) / mesh.size)


def test_the_share_of_the_peak_where_the_chip_is_known(clock, monkeypatch):
    config = tiny.config()

    class Device:
        device_kind = "TPU v5 lite"

        def __init__(self, gb):
            self._peak = gb * 10**9

        def memory_stats(self):
            return {"peak_bytes_in_use": self._peak}

    devices = [Device(2), Device(3), Device(1)]
    monkeypatch.setattr("jax.devices", lambda: devices)
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    meter = Meter(config, 1, clock)
    for _ in meter.batches([batch(16, "image")] * 2):
        clock.now += 0.5
        meter.step(meter.work)
    line = meter.read()
    assert line["mfu"] == pytest.approx(line["tflops"] / 197) and line["memory_gb"] == 3
