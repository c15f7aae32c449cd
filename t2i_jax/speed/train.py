"""The training step of a config, timed: the program of launch/train.py on synthetic numbers."""

from collections.abc import Callable
import math
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from t2i_jax import build, flops, plan, sharding
from t2i_jax.errors import UserError
from t2i_jax.speed import rates, synthetic, timing
from t2i_jax.training import program

_ROUND = 1.0  # seconds that a round should last, so that hosts run ahead of devices as in training
_STEPS = 20  # of a round, at most


def measure(
    config: ConfigDict,
    rounds: int = 5,
    *,
    latents: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Seconds a step and what follows from them, as a tree for JSON.

    With `latents` a batch is one of stored latents. Raises ConfigError for a mesh or batch that
    cannot be, UserError where the loss is no number.
    """
    mesh = sharding.make_mesh(**config.mesh)
    plan.check(config, mesh)
    with jax.set_mesh(mesh):
        step = Step(config, mesh, latents=latents, clock=clock)
        times = step.times(rounds, clock)
    if not math.isfinite(step.loss):
        raise UserError(f"The loss of the synthetic step is {step.loss}: its time means nothing.")
    model = flops.train_step(config, latents=latents)
    return {
        "what": "train",
        "config": config.name,
        **rates.place(mesh),
        "batch_size": config.train.batch_size,
        "dtype": config.train.dtype,
        "remat": config.dit.remat,
        "latents": latents,
        **rates.of(times, config.train.batch_size, sum(model.values()), mesh.size),
        "trace_seconds": round(step.traced, 2),
        "compile_seconds": round(step.compiled_in, 2),
        **rates.memory(step.compiled),
    }


class Step:
    """The compiled step and everything that it takes; to be used while the mesh is set.

    Attributes:
      traced, compiled_in: seconds.
      compiled: jax.stages.Compiled; what encodes images is one of its own, and runs before.
      loss: of the last step.
    """

    def __init__(self, config: ConfigDict, mesh: Any, *, latents: bool = False, clock=None):
        clock = clock or time.perf_counter
        programs = program.make(config, mesh, build.make_autoencoder(config))
        frozen = build.abstract_frozen(config, mesh)
        batch = program.abstract_batch(config, mesh, latents=latents)
        taken = program.abstract_encoded(programs, frozen, batch)
        start = clock()
        lowered = [programs.train_step.lower(programs.state, frozen, taken, _key(mesh))]
        if taken.keys() != batch.keys():
            lowered.append(programs.encode.lower(frozen["autoencoder"], batch["image"]))
        self.traced, start = clock() - start, clock()
        self.compiled, *encode = (one.compile() for one in lowered)
        self.compiled_in = clock() - start
        self._programs = programs._replace(encode=encode[0] if encode else None)
        self._state = programs.create(synthetic.like(programs.state.params))
        self._frozen = synthetic.like(frozen)
        self._batch = synthetic.like(batch, min(config.llm.vocab_size, config.clip.vocab_size))
        self._key = _key(mesh)
        self._metrics: Any = None

    @property
    def loss(self) -> float:
        return float(self._metrics["loss"])

    def run(self, steps: int = 1) -> Any:
        """`steps` of them, dispatched one after the other."""
        for _ in range(steps):
            batch = self._programs.encoded(self._frozen, self._batch)
            self._state, self._metrics = self.compiled(self._state, self._frozen, batch, self._key)
        return self._state

    def times(self, rounds: int, clock: Callable[[], float]) -> timing.Times:
        """Seconds a step."""
        one = timing.in_turns({"step": self.run}, 1, clock=clock)["step"].median
        steps = max(1, min(_STEPS, int(_ROUND / one) if one else _STEPS))
        found = timing.in_turns({"step": lambda: self.run(steps)}, rounds, 0, clock)["step"]
        return timing.Times(tuple(seconds / steps for seconds in found.rounds))


def _key(mesh: Any) -> jax.Array:
    return jax.device_put(jax.random.key(0), sharding.replicated(mesh))


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` in lines."""
    lines = [
        f"{found['config']}, the training step, batch {found['batch_size']}, {found['dtype']}, "
        f"on {rates.where(found)}",
        "  " + rates.line("step", found),
        f"  {found['tflop']:.4g} TFLOP a step; traced in {found['trace_seconds']} s, compiled in "
        f"{found['compile_seconds']} s",
    ]
    if told := rates.memory_line(found):
        lines.append(f"  {told}")
    return "\n".join(lines)
