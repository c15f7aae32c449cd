"""How fast a run is: <workdir>/speed.jsonl and TensorBoard, beside what it computes.

Every `train.log_every` steps one line, of the steps since the line before. Pauses (validation,
pictures, waiting for a checkpoint) are no part of a step's time; waiting for data is.

    seconds_per_step, images_per_second
    tflops       TFLOP/s of a device: the model's FLOPs (flops.py), at the lengths to which the
                 texts of these steps are cut, over the time
    mfu          the same over the peak of the device in bfloat16, where its kind is known
    data_wait    the share of the time that the host waited for a batch
    memory_gb    the most that a device of this host has held so far, where the backend tells
    pause_<name> seconds of the pauses since the line before
    goodput      the share of the time since the run's first start that went into steps that count
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from t2i_jax import flops, machines

FILE = "speed.jsonl"


class Meter:
    """Counts the time of the steps after the first, which compiles.

    Attributes:
      work: FLOPs of a device for a step on the batch that was handed out last.
    """

    def __init__(
        self, config: ConfigDict, devices: int, clock: Callable[[], float] = time.perf_counter
    ):
        self._config, self._devices, self._clock = config, devices, clock
        chip = machines.chip_of(jax.devices()[0].device_kind)
        self._peak = chip.peak if chip else None
        self._work: dict[tuple[int, bool], float] = {}  # by length of texts and kind of batch
        self.work = 0.0
        self._steps, self._flops = 0, 0.0
        self._begun: float | None = None
        self._waited = 0.0
        self._pauses: defaultdict[str, float] = defaultdict(float)

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The same batches, the time that each is waited for counted."""
        iterator = iter(source)
        while True:
            start = self._clock()
            try:
                with jax.profiler.TraceAnnotation("waiting for data"):
                    batch = next(iterator)
            except StopIteration:
                return
            self._waited += self._clock() - start
            self.work = self._flops_of(batch.arrays)
            yield batch

    def _flops_of(self, arrays: Mapping[str, Any]) -> float:
        """Those of a device for a step on these arrays; counted once for each kind of them."""
        length, latents = arrays["ids"].shape[-1], "moments" in arrays
        if (length, latents) not in self._work:
            work = flops.train_step(self._config, length, latents=latents)
            self._work[length, latents] = sum(work.values()) / self._devices
        return self._work[length, latents]

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Around what is no step."""
        start = self._clock()
        try:
            yield
        finally:
            self._pauses[name] += self._clock() - start

    def step(self, work: float) -> None:
        """A step of that `work` is done; the first one begins the count.

        The next batch has been handed out by then, so `work` is kept from when this one's was.
        """
        if self._begun is None:
            self._begin()
        else:
            self._steps += 1
            self._flops += work

    def read(self) -> dict[str, float]:
        """The line of the steps since the last one; {} where there are none."""
        if not self._steps:
            return {}
        spent = self._clock() - self._begun
        seconds = max(spent - sum(self._pauses.values()), 1e-9)
        line = {
            "seconds_per_step": seconds / self._steps,
            "images_per_second": self._config.train.batch_size * self._steps / seconds,
            "tflops": self._flops / seconds / 1e12,
        }
        if self._peak:
            line["mfu"] = self._flops / seconds / self._peak
        line["data_wait"] = self._waited / seconds
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        if all("peak_bytes_in_use" in one for one in stats):
            line["memory_gb"] = max(one["peak_bytes_in_use"] for one in stats) / 1e9
        line |= {f"pause_{name}": took for name, took in sorted(self._pauses.items())}
        self._begin()
        return line

    def _begin(self) -> None:
        self._begun, self._steps, self._flops, self._waited = self._clock(), 0, 0.0, 0.0
        self._pauses.clear()
