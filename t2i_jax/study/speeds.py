"""Speeds of the rows of a suite, on one device: all of them in turns, in one process.

Three programs of each row: a training step, a batch of pictures with the memory of the text made
once, and the same with the text read anew at every step of the solver. What can be trusted are the
ratios to the first row, round by round; seconds are of this device, on that day.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from t2i_jax import options, sharding
from t2i_jax.speed import sample, timing
from t2i_jax.speed.train import Step
from t2i_jax.study import facts

IMAGES = 8  # of a batch of pictures
WAYS = ("train", "sample", "recompute")


def measure(rows: Mapping[str, ConfigDict], rounds: int) -> list[dict[str, Any]]:
    """An entry of results.jsonl for each row; the first one is what the others are compared to."""
    ways = {}
    for name, config in rows.items():
        ways |= {(name, way): run for way, run in _programs(config).items()}
        print(f"compiled {name}", flush=True)
    times = timing.in_turns(ways, rounds)
    first = next(iter(rows))
    entries = []
    for name, config in rows.items():
        entry: dict[str, Any] = {"kind": "speed", "row": name, "images": IMAGES}
        entry["device"] = facts.device()
        entry |= {"batch_size": config.train.batch_size, "rounds": rounds}
        for way in WAYS:
            taken, theirs = times[name, way], times[first, way]
            entry[way] = taken.tree() | compared(taken, theirs)
        entry["saved"] = compared(times[name, "recompute"], times[name, "sample"])
        entries.append(entry)
    return entries


def compared(taken: timing.Times, theirs: timing.Times) -> dict[str, Any]:
    """The ratio of two times with its interval."""
    low, high = timing.ratio_interval(taken, theirs)
    found = {"ratio": timing.ratio(taken, theirs), "low": low, "high": high}
    return {name: round(value, 4) for name, value in found.items()}


def _programs(config: ConfigDict) -> dict[str, Callable[[], Any]]:
    """The three programs of a row, compiled, on synthetic numbers."""
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        step = Step(config, mesh)
        chosen = options.resolve(config)
        drawn = sample.compiled(config, mesh, IMAGES, chosen, recompute=True)
    names = {"cached": "sample", "recomputed": "recompute"}
    made: dict[str, Callable[[], Any]] = {"train": step.run}
    for name, (program, arguments) in drawn.items():
        made[names[name]] = functools.partial(program, *arguments)
    return {way: _within(mesh, run) for way, run in made.items()}


def _within(mesh: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    def call():
        with jax.set_mesh(mesh):
            return run()

    return call
