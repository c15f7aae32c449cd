"""Commands on the devices at hand: one process a device, the next one when a device is free.

On CPUs a device is a core: small programs use one core well, and two of them badly. Each process is
bound to its core, so that it computes the same whatever else runs. Processes end with this one,
however that ends: their standard input closes. SIGTERM is handed on, and waited for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from t2i_jax.errors import ConfigError, UserError
from t2i_jax.training.preemption import EXIT_PREEMPTED, PreemptedError

_POLL = 0.1  # seconds
_ROOT = Path(__file__).resolve().parent.parent.parent
_STOPPED = (EXIT_PREEMPTED, -signal.SIGTERM)
# A training step of the small models is a sixth faster without one kind of fusion that XLA's CPU
# backend tries, and another eighth if glibc keeps the memory of a step for the next one.
_CPU = {
    "JAX_PLATFORMS": "cpu",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
_CPU_FLAGS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT "
_CPU_FLAGS += "--xla_force_host_platform_device_count=1"
_LOOK = """
import json, jax
found = jax.devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
"""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A device: its name, what a process on it has in its environment, and its core."""

    name: str
    environ: Mapping[str, str]
    core: int | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """A command; `name` is for people, `log` gets what it says."""

    name: str
    command: Sequence[str]
    log: Path


@dataclasses.dataclass(frozen=True)
class Done:
    """A job that has ended: with `status`, after `seconds`."""

    job: Job
    status: int
    seconds: float


def slots(parallel: int | None = None) -> list[Slot]:
    """The devices of this machine, looked at by a process that is gone afterwards.

    `parallel` is how many processes there are to be: on CPUs of the cores, at most all of them; on
    other devices it is a multiple of their number, and each device is shared by as many.
    """
    found = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"JAX finds no device:\n{found.stderr.strip()}")
    platform, kind, count = json.loads(found.stdout.splitlines()[-1])
    if platform == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        flags = f"{os.environ.get('XLA_FLAGS', '')} {_CPU_FLAGS}".strip()
        environ = {**_CPU, "XLA_FLAGS": flags}
        if cores is None:  # they cannot be told apart here
            every = [Slot(f"core {i}", environ) for i in range(os.cpu_count() or 1)]
        else:
            every = [Slot(f"core {core}", environ, core) for core in cores]
        if parallel and parallel > len(every):
            raise ConfigError(f"--parallel={parallel}: there are {len(every)} cores.")
        return every[:parallel]
    share, rest = divmod(parallel or count, count)
    if rest or not share or (platform == "tpu" and share > 1):
        raise ConfigError(f"--parallel={parallel} does not go with {count} x {kind}.")
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / share:.2f}"} if share > 1 else {}
    return [Slot(f"{kind} {i}", _only(platform, i) | memory) for i in range(count)] * share


def _only(platform: str, i: int) -> dict[str, str]:
    """What shows a process the `i`-th alone of the devices that this one may see."""
    variable = "TPU_VISIBLE_CHIPS" if platform == "tpu" else "CUDA_VISIBLE_DEVICES"
    seen = [name for name in os.environ.get(variable, "").split(",") if name]
    shown = {variable: seen[i] if seen else str(i)}
    if platform == "tpu":
        shown |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    return shown


def run(jobs: Iterable[Job], places: Sequence[Slot]) -> Iterator[Done]:
    """Runs all jobs, yielding each as it ends.

    Raises PreemptedError, when the processes have ended, where this one is asked to stop.
    """
    waiting, running, free = iter(jobs), {}, list(places)
    with _ending(running) as stopping:
        while True:
            while free and not stopping.asked and (job := next(waiting, None)) is not None:
                slot = free.pop(0)
                process = _start(job, slot)
                running[process] = job, slot, time.monotonic()
                if stopping.asked:  # between the two lines
                    process.send_signal(signal.SIGTERM)
            if not running:
                break
            for process in [p for p in running if p.poll() is not None]:
                job, slot, began = running.pop(process)
                free.append(slot)
                if stopping.asked and process.returncode in _STOPPED:
                    continue
                yield Done(job, process.returncode, time.monotonic() - began)
            time.sleep(_POLL)
    if stopping.asked:
        raise PreemptedError("Stopped; what was done is kept. Start again to go on.")


def _start(job: Job, slot: Slot) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environ = os.environ | slot.environ
    found = [str(_ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    environ["PYTHONPATH"] = os.pathsep.join(found)

    def bind():
        if slot.core is not None:
            os.sched_setaffinity(0, {slot.core})

    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.PIPE,  # closes when this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # Ctrl-C is for this process, which hands it on
            preexec_fn=bind if slot.core is not None else None,
        )


def foreground(command: Sequence[str]) -> int:
    """Runs one command here, on all devices; its status. It is asked to stop where this is."""
    running: dict[subprocess.Popen, Any] = {}
    with _ending(running) as stopping:
        process = subprocess.Popen(command, start_new_session=True)
        running[process] = None
        if stopping.asked:
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        del running[process]
    return status


class _Stopping:
    asked = False


@contextlib.contextmanager
def _ending(running: Mapping[subprocess.Popen, Any]) -> Iterator[_Stopping]:
    """SIGTERM and Ctrl-C are handed on to what runs, and nothing is left behind."""
    stopping, before = _Stopping(), {}

    def ask(*_: Any) -> None:
        stopping.asked = True
        for process in running:
            process.send_signal(signal.SIGTERM)

    handler: Callable[..., None] = ask
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handler)
    try:
        yield stopping
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        for process in running:
            process.kill()
            process.wait()
