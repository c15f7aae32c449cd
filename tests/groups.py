"""Several real processes of one run, on this machine."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

from tests.processes import TINY

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 400  # seconds, for all processes of a run on a busy machine
RUN = {  # what differs from the run that is killed: less of it, but watched
    "pretrain.steps": 20,
    "train.steps": 4,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "validation.every": 2,
    "sampling.every": 4,
    "profile.start": 1,
    "profile.steps": 1,
}


class Group:
    """`count` processes with `devices` simulated devices each; output and status of each.

    `flags` are those of all, `own` of process i alone; processes of `absent` never start. What is
    compiled is kept in `cache`.
    """

    def __init__(
        self,
        script,
        flags,
        count,
        devices,
        log,
        *,
        own=None,
        absent=(),
        timeout=LIMIT,
        cache=None,
    ):
        with socket.create_server(("localhost", 0)) as server:
            self.address = f"localhost:{server.getsockname()[1]}"
        self._logs, self._processes = {}, {}
        environment = {
            **os.environ,
            "XLA_FLAGS": re.sub(
                "device_count=8", f"device_count={devices}", os.environ["XLA_FLAGS"]
            ),
            "PYTHONPATH": str(ROOT),
        }
        if cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
            environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for i in sorted({*range(count)} - {*absent}):
            several = [
                f"--coordinator={self.address}",
                f"--num_processes={count}",
                f"--process_id={i}",
                f"--start_timeout={timeout}",
            ]
            self._logs[i] = log.with_name(f"{log.name}_{i}.log")
            with self._logs[i].open("wb") as file:
                self._processes[i] = subprocess.Popen(
                    [
                        sys.executable,
                        ROOT / script,
                        *flags,
                        *(several if count > 1 else []),
                        *(own or {}).get(i, []),
                    ],
                    env=environment,
                    stdout=file,
                    stderr=file,
                )
        self._deadline = time.monotonic() + LIMIT

    def outputs(self):
        return {i: log.read_text(errors="replace") for i, log in self._logs.items()}

    def statuses(self):
        """Exit statuses, when all have ended by themselves."""
        try:
            left = (max(0, self._deadline - time.monotonic()) for _ in self._processes)
            waited = zip(self._processes.items(), left, strict=True)
            return {i: process.wait(seconds) for (i, process), seconds in waited}
        finally:
            for process in self._processes.values():
                process.kill()

    def finish(self):
        statuses = self.statuses()
        assert not any(statuses.values()), (statuses, self.outputs())
        return self.outputs()


def training(workdir, count, devices, *flags, **options):
    """A run of launch/train.py in `workdir`."""
    config = {f"{s}.{k}": v for s, keys in TINY.items() for k, v in keys.items()} | RUN
    given = [f"--config.{key}={value}" for key, value in config.items()]
    paths = [f"--config={ROOT / 'configs' / 'scenes.py'}", f"--workdir={workdir}"]
    log = workdir.parent / f"{workdir.name}_{count}"
    return Group("launch/train.py", [*paths, *given, *flags], count, devices, log, **options)
