"""Real processes of launch/train.py: started, hurt, and waited for."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax

from t2i_jax import build, checkpoint, frozen, sharding
from t2i_jax.training import program

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("T2I_FAULT_KILLS", "1"))  # at random moments; 20 are the full suite
STEPS, EVERY, VALIDATE = 40 + 7 * max(0, KILLS - 2), 7, 10
LIMIT = 240  # seconds, for one process on a busy machine
TINY = {
    "llm": {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    | {"head_width": 8, "mlp_width": 32, "unroll": 1},
    "pretrain": {"steps": 80, "batch_size": 8, "vocab_size": 300},
    "dit": {"width": 32, "num_layers": 2, "mlp_width": 64, "patch_size": 6, "unroll": 1},
    "data": {
        "image_size": 24,
        "max_text_tokens": 24,
        "validation_size": 16,
        "caption_dropout": 0.2,
    },
    "optimizer": {"warmup_steps": 3},
    "train": {"steps": STEPS, "batch_size": 8, "log_every": 1},
    "checkpoint": {"every": EVERY, "keep": 2},
    "validation": {"every": VALIDATE},
    "sampling": {"every": 0},
}


class Training:
    """One process of launch/train.py in a working directory, with `devices` simulated ones.

    Programs that were compiled once are kept in `cache`; only the process with `fill` writes there,
    because one that is killed may leave half a program.
    """

    def __init__(self, workdir, cache, *flags, devices=2, fill=False, name=""):
        self.workdir = workdir
        workdir.mkdir(exist_ok=True)
        number = len(list(workdir.parent.glob(f"{workdir.name}{name}.*.log")))
        self._log = workdir.parent / f"{workdir.name}{name}.{number}.log"  # small, on any disk
        config = [f"--config.{s}.{k}={v}" for s, keys in TINY.items() for k, v in keys.items()]
        environment = {
            "XLA_FLAGS": re.sub(
                "device_count=8", f"device_count={devices}", os.environ["XLA_FLAGS"]
            ),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill else "1e9",
        }
        with self._log.open("xb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "launch" / "train.py",
                    f"--config={ROOT / 'configs' / 'scenes.py'}",
                    f"--workdir={workdir}",
                    *config,
                    *flags,
                ],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )
        self._deadline = time.monotonic() + LIMIT

    def output(self):
        return self._log.read_text(errors="replace")

    def steps(self):
        """The newest training step that metrics.jsonl tells of, whoever wrote it."""
        file = self.workdir / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        found = re.findall(r'"step": (\d+).* "loss": .*\n', text)
        return int(found[-1]) if found else 0

    def resumed(self):
        """The step that it has resumed at; None where it has begun anew, or not yet."""
        found = re.search(r"resumed at step (\d+) of", self.output())
        return int(found[1]) if found else None

    def ready(self):
        """Whether it has made a step itself."""
        return f"training {(self.resumed() or 0) + 1}/" in self.output()

    def wait_for(self, condition):
        """Until `condition(self)` is true; it must not end before."""
        while not condition(self):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < self._deadline, self.output()
            time.sleep(0.005)

    def kill_when(self, condition):
        """SIGKILL at once when `condition(self)` is true."""
        self.wait_for(condition)
        self.process.kill()
        assert self.process.wait() == -9, "it ended before it was killed"

    def end(self):
        """Its exit status; it ends by itself."""
        try:
            return self.process.wait(max(0, self._deadline - time.monotonic()))
        finally:
            self.process.kill()

    def finish(self):
        assert self.end() == 0, self.output()
        return self


def saving(training):
    """A checkpoint of step 14 or later is incomplete on the disk."""
    directory = training.workdir / "checkpoints"
    names = os.listdir(directory) if directory.exists() else []
    return any("tmp" in name and int(name.split(".")[0]) >= 14 for name in names)


def at(number):
    """It has made steps itself, and metrics.jsonl tells of step `number`."""
    return lambda training: training.ready() and training.steps() >= number


def last_state(workdir):
    """(the final TrainState, the language model) on one device."""
    with checkpoint.Checkpoints(workdir) as saved:
        assert saved.steps()[-1] == STEPS and len(saved.steps()) == 2
        config = saved.config(STEPS)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        like, _, _ = program.abstract_state(config, mesh)
        llm = build.abstract_frozen(config, mesh)["llm"]
        return saved.restore(STEPS, like), checkpoint.load_tree(frozen.llm_path(workdir), llm)


def saves_of_the_last_start(workdir):
    """The steps that the newest start of a run has saved, in order."""
    events = list(map(json.loads, (workdir / "history.jsonl").read_text().splitlines()))
    first = max(i for i, event in enumerate(events) if event["event"] == "start")
    return [event["step"] for event in events[first:] if event["event"] == "saved"]
