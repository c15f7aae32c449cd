"""A run that is killed again and again ends, bit by bit, as one that was left alone.

Real processes of launch/train.py on two simulated devices, killed by SIGKILL: while the language
model is trained, while a checkpoint is being written, and between checkpoints.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from t2i_jax import build, checkpoint, frozen, sharding
from t2i_jax.training import optimizer, state
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY, VALIDATE = 40, 7, 10
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
    """One process of launch/train.py in a working directory."""

    def __init__(self, workdir):
        self.workdir = workdir
        workdir.mkdir(exist_ok=True)
        self._log = workdir.parent / f"{workdir.name}.log"
        start = self._log.stat().st_size if self._log.exists() else 0
        self._start = start
        flags = [f"--config.{s}.{k}={v}" for s, keys in TINY.items() for k, v in keys.items()]
        devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "launch" / "train.py",
                    f"--config={ROOT / 'configs' / 'scenes.py'}",
                    f"--workdir={workdir}",
                    *flags,
                ],
                env=os.environ | {"XLA_FLAGS": devices},
                stdout=log,
                stderr=log,
            )
        self._deadline = time.monotonic() + LIMIT

    def output(self):
        return self._log.read_bytes()[self._start :].decode()

    def steps(self):
        """Training steps that metrics.jsonl tells of."""
        file = self.workdir / "metrics.jsonl"
        return len(re.findall(r'"loss": .*\n', file.read_text())) if file.exists() else 0

    def kill_when(self, condition):
        """SIGKILL at once when `condition(self)` is true."""
        while not condition(self):
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < self._deadline, self.output()
            time.sleep(0.001)
        self._process.kill()
        assert self._process.wait() == -9, "it ended before it was killed"

    def finish(self):
        try:
            code = self._process.wait(self._deadline - time.monotonic())
        finally:
            self._process.kill()
        assert code == 0, self.output()


def pretraining(training):
    return "language model 10/80" in training.output()


def saving(training):
    """A checkpoint of step 14 or later is incomplete on the disk."""
    directory = training.workdir / "checkpoints"
    names = os.listdir(directory) if directory.exists() else []
    return any("tmp" in name and int(name.split(".")[0]) >= 14 for name in names)


def past(number, complete):
    """Some steps after a checkpoint that is complete on the disk."""
    return lambda training: (
        training.steps() >= number and (training.workdir / "checkpoints" / complete).exists()
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(working directory left alone, working directory of the killed run, steps it resumed at)"""
    parent = tmp_path_factory.mktemp("runs")
    alone, resumed = Training(parent / "alone"), []
    for condition in (pretraining, past(11, "7"), saving, past(30, "28"), None):
        training = Training(parent / "killed")
        if condition is None:
            training.finish()
        else:
            training.kill_when(condition)
        said = re.search(r"resumed at step (\d+) of 40", training.output())
        resumed.append(int(said[1]) if said else None)
    alone.finish()
    return alone.workdir, training.workdir, resumed


def test_it_went_on_from_its_newest_complete_checkpoint(runs):
    _, _, resumed = runs
    assert resumed[:2] == [None, None]
    assert 7 <= resumed[2] <= resumed[3] < 28 <= resumed[4] < STEPS


def test_the_metrics_are_the_same(runs):
    """Every number of every step, once each, in order."""
    texts = [(workdir / "metrics.jsonl").read_text() for workdir in runs[:2]]
    assert texts[0] == texts[1]
    entries = [json.loads(line) for line in texts[0].splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    assert all("grad_norm" in entry for entry in losses)
    validations = [entry["step"] for entry in entries if "validation_loss" in entry]
    assert validations == list(range(VALIDATE, STEPS + 1, VALIDATE))
    assert len(entries) == len(losses) + len(validations)
    values = [entry["loss"] for entry in losses]
    assert sum(values[-10:]) < sum(values[:10])  # it learned something meanwhile


def last_state(workdir):
    """(the final TrainState, the language model) on one device."""
    with checkpoint.Checkpoints(workdir) as saved:
        assert saved.steps()[-1] == STEPS and len(saved.steps()) == 2
        config = saved.config(STEPS)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        boxed, boxed_frozen = build.abstract_params(config)
        trained = build.sharded(boxed, mesh)
        update, _ = optimizer.make(config.optimizer, STEPS, boxed)
        whole = jax.eval_shape(lambda p: state.create(p, update), trained)
        like = checkpoint.abstract(whole, state.shardings(whole, trained, mesh))
        llm = build.sharded(boxed_frozen["llm"], mesh)
        return saved.restore(STEPS, like), checkpoint.load_tree(frozen.llm_path(workdir), llm)


def test_parameters_average_and_optimiser_are_the_same(runs):
    alone, killed = (last_state(workdir) for workdir in runs[:2])
    tiny.equal(killed, alone)
    assert alone[0].step == STEPS
    tokenizers = [(workdir / "tokenizer" / "tokenizer.json").read_text() for workdir in runs[:2]]
    assert tokenizers[0] == tokenizers[1]


def test_nothing_incomplete_is_left_behind(runs):
    names = [sorted(p.name for p in workdir.iterdir()) for workdir in runs[:2]]
    assert names[0] == names[1]
    checkpoints = [sorted(os.listdir(workdir / "checkpoints")) for workdir in runs[:2]]
    assert checkpoints == [["35", "40"]] * 2
