"""Speed, by a clock that the test sets."""

import pytest

from t2i_jax import flops
from t2i_jax.training.meter import Meter
from tests import tiny
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock()


def test_a_line_is_of_the_steps_since_the_last_one(clock):
    config = tiny.config()
    meter = Meter(config, 8, clock)
    assert meter.read() == {}

    def data():
        for waited in (50.0, 0.5, 1.5, 0.0):
            clock.now += waited
            yield waited

    batches = meter.batches(data())
    next(batches)
    clock.now += 30  # compiles
    meter.step()
    assert meter.read() == {}
    for _ in range(2):
        next(batches)
        clock.now += 3
        meter.step()
    with meter.pause("validation"):
        clock.now += 7
    line = meter.read()
    per_step = sum(flops.train_step(config).values())
    assert line == pytest.approx(
        {
            "seconds_per_step": 4.0,
            "images_per_second": config.train.batch_size / 4,
            "tflops": per_step / 8 / 4 / 1e12,
            "data_wait": 2 / 8,
            "pause_validation": 7.0,
        }
    )
    assert next(batches) == 0.0
    clock.now += 2
    meter.step()
    assert meter.read()["seconds_per_step"] == 2.0
    assert list(batches) == []


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
    meter.step()
    clock.now += 0.5
    meter.step()
    line = meter.read()
    assert line["mfu"] == pytest.approx(line["tflops"] / 197) and line["memory_gb"] == 3
