"""Seconds, what follows from them, and numbers made where they live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import machines, sharding
from t2i_jax.speed import rates, synthetic, timing
from t2i_jax.speed.timing import Times
from tests.clock import Clock


def test_rounds_in_turns_without_the_first():
    clock, order = Clock(), []
    seconds = {"a": iter([50, 1, 9, 2]), "b": iter([70, 4, 4, 4])}

    def run(way):
        order.append(way)
        clock.now += next(seconds[way])

    ways = {way: lambda way=way: run(way) for way in "ab"}
    found = timing.in_turns(ways, 3, clock=clock)
    assert found == {"a": Times((1, 9, 2)), "b": Times((4, 4, 4))}
    assert "".join(order) == "abbaabba"
    assert found["a"].tree() == {"median": 2, "least": 1, "most": 9, "rounds": 3}
    assert timing.ratio(found["b"], found["a"]) == 2  # of 4, 4/9 and 2


def test_figures_of_a_time(monkeypatch):
    times = Times((1.0, 2.0, 4.0))
    found = rates.of(times, 8, 6e12, 3)
    assert found["images_per_second"] == 4 and found["tflop"] == 6
    assert found["tflops_per_device"] == 1 and "mfu" not in found
    monkeypatch.setattr(machines, "chip_of", lambda kind: machines.Chip("toy", 1e9, 4e12))
    found = rates.of(times, 8, 6e12, 3)
    assert found["mfu"] == 0.25
    line = rates.line("step", found)
    assert "2 s (1 to 4 in 3 rounds), 4 images/s, 1 TFLOP/s a device, MFU 25.0%" in line


def test_memory_where_it_is_told():
    class Compiled:
        def memory_analysis(self):
            return type("", (), {"peak_memory_in_bytes": 3_000_000})

    assert rates.memory() == {}  # a CPU tells nothing
    found = rates.memory(Compiled())
    assert found == {"planned_bytes": 3_000_000}
    assert rates.memory_line(found) == "memory of a device: 3 MB planned by the compiler"
    assert rates.memory_line({}) == ""


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "uint8", "int8", "uint16", "int32", "bool"]
)
def test_synthetic_numbers_are_the_same_on_any_mesh(dtype):
    made = []
    for mesh in (sharding.make_mesh(2, 4), sharding.make_mesh(devices=jax.devices()[:1])):
        place = jax.NamedSharding(mesh, sharding.to_spec(("batch", None)))
        like = {"x": jax.ShapeDtypeStruct((64, 32), dtype, sharding=place)}
        made.append(synthetic.like(like, 10)["x"])
        assert made[-1].sharding == place and made[-1].dtype == jnp.dtype(dtype)
    x, same = (np.asarray(array, np.float64) for array in made)
    np.testing.assert_array_equal(x, same)
    least, most, mean, spread = {
        "float32": (-0.035, 0.035, 0, 0.02),
        "bfloat16": (-0.035, 0.035, 0, 0.02),
        "uint8": (0, 255, 127.5, 73.9),
        "int8": (-128, 127, -0.5, 73.9),
        "uint16": (0, 2**14 - 1, 2**13, 4730),
        "int32": (0, 9, 4.5, 2.87),
        "bool": (1, 1, 1, 0),
    }[dtype]
    assert least <= x.min() and x.max() <= most
    assert x.mean() == pytest.approx(mean, abs=0.1 * spread)
    assert x.std() == pytest.approx(spread, rel=0.05)
    if dtype != "bool":  # no two rows are alike
        assert len(np.unique(x, axis=0)) == 64


def test_moments_are_finite():
    place = sharding.replicated(sharding.make_mesh())
    like = jax.ShapeDtypeStruct((4096,), jnp.uint16, sharding=place)
    values = jax.lax.bitcast_convert_type(synthetic.like(like), jnp.bfloat16)
    assert float(values.min()) >= 0 and float(values.max()) < 2


def test_the_interval_of_a_ratio_is_of_its_median_by_ranks():
    ones = timing.Times((1.0,) * 25)
    values = tuple(float(x) for x in np.random.default_rng(0).permutation(25))
    low, high = timing.ratio_interval(timing.Times(values), ones)
    # 25 / 2 -+ 4.9: ranks 7 and 18, counted from 0; the binomial has 7 and 17 at 95%.
    assert (low, high) == (7.0, 18.0) and low < timing.ratio(timing.Times(values), ones) < high
    assert timing.ratio_interval(timing.Times((2.0, 3.0)), timing.Times((1.0, 1.0))) == (2.0, 3.0)


def test_short_things_are_measured_more_often():
    assert timing.rounds_for(20.0, 0.2, 15) == 100
    assert timing.rounds_for(20.0, 9.0, 15) == 15
