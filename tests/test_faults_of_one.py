"""A run that is hurt in every way ends, bit by bit, as one that was left alone.

Real processes of launch/train.py on two simulated devices, one after the other in one working
directory: killed while the language model is trained, while a checkpoint is being written, and at
random moments (T2I_FAULT_KILLS of them); asked to stop by SIGTERM; its newest checkpoint cut; its
disk full. A stalled process is in test_faults_of_two.py.
"""

import json
import os
import random
import resource
import signal
import time

import pytest

from t2i_jax import checkpoint
from t2i_jax.training.history import goodput
from t2i_jax.training.preemption import EXIT_PREEMPTED
from tests import tiny
from tests.processes import (
    EVERY,
    KILLS,
    STEPS,
    VALIDATE,
    Training,
    at,
    last_state,
    saves_of_the_last_start,
    saving,
)

SEED = int(os.environ.get("T2I_FAULT_SEED", "0"))
FULL = 40_000  # bytes that a file may have; a checkpoint has larger ones, and nothing else


def pretraining(training):
    return "language model 10/80" in training.output()


def at_random(rng):
    """A moment from the start of a process to some steps after its first one, saves included."""
    seconds, steps = rng.uniform(0, 8), rng.randint(1, EVERY + 4)
    late, start = rng.random() < 0.7, time.monotonic()

    def reached(training):
        if not late:
            return time.monotonic() - start > seconds
        done = (training.resumed() or 0) + steps
        return training.ready() and training.steps() >= min(done, STEPS - 10)

    return reached


def newest(workdir):
    return checkpoint.find(workdir)[1]


def cut_newest(workdir, rng):
    """The data of the newest checkpoint's parameters, every file at a random byte: its step.

    Every file, because not all that is in them is read.
    """
    step = newest(workdir)
    files = (workdir / "checkpoints" / str(step) / "params").rglob("d/*")
    for file in sorted(f for f in files if f.is_file() and f.stat().st_size):
        os.truncate(file, rng.randrange(file.stat().st_size))
    return step


class Hurt:
    """The working directory that everything happens to, and what was seen of it."""

    def __init__(self, workdir, cache):
        self.workdir, self._cache, rng = workdir, cache, random.Random(SEED)
        self._start().kill_when(pretraining)
        self._start().kill_when(saving)
        killed = []
        for _ in range(KILLS):
            killed.append(self._start())
            killed[-1].kill_when(at_random(rng))
        self.ready = sum(training.ready() for training in killed)
        self.asked = self._ask()
        self.cut = cut_newest(workdir, rng)
        self.filled = self._fill()
        self.last = self._start().finish()

    def _start(self):
        return Training(self.workdir, self._cache)

    def _ask(self):
        training = self._start()
        training.wait_for(at(0))
        training.process.send_signal(signal.SIGTERM)
        training.process.send_signal(signal.SIGTERM)
        self.asked_code = training.end()
        self.saved = newest(self.workdir)
        self.asked_saves = saves_of_the_last_start(self.workdir)
        return training

    def _fill(self):
        training = self._start()
        training.wait_for(at(0))
        resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (FULL, FULL))
        self.filled_code = training.end()
        self.intact = newest(self.workdir)
        self.left = os.listdir(self.workdir / "checkpoints")
        return training


@pytest.fixture(scope="module")
def hurt(undisturbed):
    return Hurt(undisturbed.parent / "hurt", undisturbed.parent / "programs")


def test_the_metrics_are_the_same(undisturbed, hurt):
    """Every number of every step, once each, in order."""
    texts = [(workdir / "metrics.jsonl").read_text() for workdir in (undisturbed, hurt.workdir)]
    assert texts[0] == texts[1]
    entries = [json.loads(line) for line in texts[0].splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    assert all("grad_norm" in entry for entry in losses)
    validations = [entry["step"] for entry in entries if "validation_loss" in entry]
    assert validations == sorted({*range(VALIDATE, STEPS + 1, VALIDATE), STEPS})
    assert len(entries) == len(losses) + len(validations)
    values = [entry["loss"] for entry in losses]
    assert sum(values[-10:]) < sum(values[:10])  # it learned something meanwhile


def test_asked_to_stop_it_saves_once_and_says_so(hurt):
    assert hurt.asked_code == EXIT_PREEMPTED
    assert f"Stopped by SIGTERM after step {hurt.saved}, which is saved" in hurt.asked.output()
    assert hurt.asked.resumed() < hurt.saved < STEPS
    *regular, last = hurt.asked_saves
    assert last == hurt.saved and all(step % EVERY == 0 for step in regular)
    assert "Traceback" not in hurt.asked.output()


def test_a_damaged_checkpoint_is_told_and_put_aside(hurt):
    said = hurt.filled.output()
    assert f"WARNING: checkpoint {hurt.cut} of {hurt.workdir}/checkpoints is damaged: para" in said
    assert hurt.filled.resumed() < hurt.cut == hurt.saved
    aside = hurt.workdir / "damaged_checkpoints" / str(hurt.cut)
    assert f"checkpoint {hurt.cut} is now {aside}; going on from checkpoint" in said
    assert (aside / "params").exists()


def test_a_full_disk_stops_it_with_the_last_checkpoint_intact(hurt):
    assert hurt.filled_code == 1
    said = hurt.filled.output()
    assert f"could not be written to {hurt.workdir}/checkpoints: " in said
    assert f"Checkpoint {hurt.intact} is intact. Make room for it" in said
    assert "Traceback" not in said and "never retrieved" not in said
    assert all(name.isdigit() or "tmp" in name for name in hurt.left)
    assert hurt.last.resumed() == hurt.intact


def test_the_history_tells_of_every_start(hurt):
    lines = (hurt.workdir / "history.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    starts = sum(event["event"] == "start" for event in events)
    assert hurt.ready + 5 <= starts <= KILLS + 5  # some may be killed before they say anything
    causes = [event["cause"] for event in events if event["event"] == "end"]
    assert causes == ["PreemptedError", "StorageError", "finished"]
    assert 0 < goodput(hurt.workdir) < 0.9


def test_parameters_average_and_optimiser_are_the_same(undisturbed, hurt):
    alone, after = (last_state(workdir) for workdir in (undisturbed, hurt.workdir))
    tiny.equal(after, alone)
    assert alone[0].step == STEPS
    texts = [
        (workdir / "tokenizer" / "tokenizer.json").read_text()
        for workdir in (undisturbed, hurt.workdir)
    ]
    assert texts[0] == texts[1]


def test_nothing_incomplete_is_left_behind(undisturbed, hurt):
    names = [{p.name for p in workdir.iterdir()} for workdir in (undisturbed, hurt.workdir)]
    assert names[1] - names[0] == {"damaged_checkpoints"}
    assert not names[0] - names[1]
    last = (STEPS - 1) // EVERY * EVERY
    found = [sorted(os.listdir(w / "checkpoints")) for w in (undisturbed, hurt.workdir)]
    assert found == [[str(last), str(STEPS)]] * 2
