"""What a run looks at while it trains: losses, norms, held-out samples, pictures, bad samples."""

from collections.abc import Callable, Iterator, Mapping
import math
from typing import Any

import jax
import numpy as np

from t2i_jax import sharding
from t2i_jax.data.samples import Fault
from t2i_jax.errors import UserError
from t2i_jax.evaluation import pictures
from t2i_jax.progress import Progress
from t2i_jax.training import faults, held_out, state
from t2i_jax.training.exam import Exam
from t2i_jax.training.meter import Meter
from t2i_jax.training.metrics import MetricWriter, read_metrics
from t2i_jax.training.parts import Parts
from t2i_jax.training.wandb_log import WandbLog


class NonFiniteError(UserError):
    """The loss or the gradient is no longer a number."""


class Watch:
    """Reads metrics one step behind, checks and writes them; draws and validates on request.

    Attributes:
      asked: whether a process was asked to stop, the same in all of them after the same step.
      meter: of the time that steps take.
    """

    def __init__(self, parts: Parts, start: int, goodput: Callable[[], float]):
        """`start` is the step that is resumed at; process 0 asks for the `goodput` until now."""
        self._parts, config = parts, parts.config
        self._goodput = goodput
        self.asked = False
        self._pending: tuple[int, Any, float] | None = None
        self._shown: dict[str, float] = {}
        self._main = jax.process_index() == 0
        self._writer = _writer(parts, start) if self._main else None
        images = config.train.batch_size
        self._bar = Progress(config.train.steps, start, images, shown=self._main)
        batch_size, rate = config.train.batch_size, config.data.max_bad_rate
        self.meter = Meter(config, parts.mesh.size)
        self._bad = faults.FaultCount(rate, batch_size, faults.count(parts.workdir, start))
        hosts = jax.process_index(), jax.process_count()
        self._faults = faults.FaultLog(parts.workdir, *hosts, start)
        self._exam = Exam(parts)
        self._tells = sharding.tells_rows(parts.mesh)  # and no other host the same bad samples
        self._faults.add(0, (*parts.damage, *parts.train_loader.left_out))

    def dispatched(self, number: int, metrics: Any, bad: tuple[Fault, ...]) -> None:
        """A step is under way: looks at the one before it."""
        self.settle()
        self._pending = (number, metrics, self.meter.work)
        self._tell(number, bad)

    def settle(self) -> None:
        """Waits for the pending step. Raises NonFiniteError where it is not finite."""
        if self._pending is None:
            return
        number, metrics, work = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        bad_C = metrics.pop("bad")
        self.asked |= bool(metrics.pop("stop", False))
        values = dict(_numbers(metrics))
        if not all(math.isfinite(value) for value in values.values()):
            self.leave()
            raise NonFiniteError(
                f"Step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"update norm {values['update_norm']}. "
                "Nothing of it was saved; the newest checkpoint is intact. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the data."
            )
        self._count(number, bad_C)
        self.meter.step(work)
        config = self._parts.config.train
        if number % config.log_every == 0 or number == config.steps:
            self._write(number, values | self._bad.metrics())
            self._write_speed(number)
        self._shown["loss"] = values["loss"]
        self._bar.update(number, **self._shown)

    def _count(self, number: int, bad_C: np.ndarray) -> None:
        """Raises DataError where too much of the data is bad."""
        self._bad.add(bad_C)
        if self._bad.too_many:
            self.leave()
            causes = ", ".join(f"{k}: {v}" for k, v in self._bad.metrics().items())
            raise faults.DataError(
                f"Step {number}: more than data.max_bad_rate = "
                f"{self._parts.config.data.max_bad_rate:g} of the newest {faults.WINDOW} samples "
                f"cannot be used ({causes}). The newest:\n  "
                + "\n  ".join(faults.newest(self._parts.workdir))
                + f"\nAll are in {self._parts.workdir / faults.FOLDER}. Mend the data, or raise "
                "the limit; the newest checkpoint is intact."
            )

    def validate(self, number: int, current: state.TrainState) -> None:
        """Loss of the averaged weights on the held-out samples, at fixed times and noise."""
        self.settle()
        parts, config = self._parts, self._parts.config
        programs, fixed = parts.programs, parts.pipeline.frozen
        key = jax.random.fold_in(jax.random.key(config.seed), state.Stream.VALIDATION)
        losses, rows = [], []
        for i, batch in enumerate(held_out.batches(parts)):
            self._tell(number, batch.faults)
            arrays = sharding.shard_batch(batch.arrays, parts.mesh)
            rng = jax.random.fold_in(key, i)
            arrays = programs.encoded(fixed, arrays)
            losses.append(programs.validate(current.ema, fixed, arrays, rng))
            rows.append(len(batch.arrays["ids"]))
        loss = np.average([np.asarray(x) for x in losses], axis=0, weights=rows)
        by_time = {
            f"validation_loss_t{t:g}": float(x)
            for t, x in zip(config.validation.timesteps, loss, strict=True)
        }
        self._write(number, {"validation_loss": float(np.mean(loss)), **by_time})
        self._shown["validation"] = float(np.mean(loss))

    def draw(self, number: int, current: state.TrainState) -> None:
        """Pictures of `sampling.prompts` by the averaged weights."""
        self.settle()
        prompts = list(self._parts.config.sampling.prompts)
        images = self._parts.pipeline._replace(params=current.ema).draw(prompts)
        if self._main:
            picture = np.asarray(pictures.grid(images, prompts, columns=min(4, len(prompts))))
            path = self._parts.workdir / "samples" / f"step_{number:07d}.png"
            self._writer.image(number, "samples", picture, path)

    def evaluate(self, number: int, current: state.TrainState) -> None:
        """Scores of the averaged weights (exam.py)."""
        self.settle()
        values = self._exam(self._parts.pipeline._replace(params=current.ema))
        self._write(number, values)

    def flush(self) -> None:
        """What was told so far is stored after it, as what a checkpoint stands on has to be."""
        self._faults.flush()
        if self._main:
            self._writer.flush()

    def close(self) -> None:
        """After the last step: what is pending, and loss.png."""
        self.settle()
        self.leave(finished=True)
        if self._main:
            metrics = read_metrics(self._parts.workdir)
            if any("loss" in entry for entry in metrics):
                pictures.loss_plot(metrics, self._parts.workdir / "loss.png")

    def leave(self, *, finished: bool = False) -> None:
        """Nothing more is written; unless it is `finished`, the run does not end here."""
        self._bar.close()
        self._faults.close()
        if self._main:
            self._writer.close(finished=finished)

    def _tell(self, number: int, bad: tuple[Fault, ...]) -> None:
        if self._tells:
            self._faults.add(number, bad)

    def _write(self, number: int, values: dict[str, float]) -> None:
        if self._main:
            self._writer.scalars(number, values)

    def _write_speed(self, number: int) -> None:
        line = self.meter.read()
        if line and self._main:
            self._writer.speed(number, line | {"goodput": self._goodput()})


def _writer(parts: Parts, start: int) -> MetricWriter:
    wandb = WandbLog(parts.config, parts.workdir) if parts.config.train.wandb else None
    return MetricWriter(parts.workdir, start, wandb)


def _numbers(metrics: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """Scalars as they are; of an array (n,) every number, as name_00 and so on."""
    for name, value in metrics.items():
        if np.ndim(value):
            yield from ((f"{name}_{i:02d}", float(x)) for i, x in enumerate(value))
        else:
            yield name, float(value)
