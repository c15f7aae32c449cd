"""Two processes of one run: one is killed, one stalls, one alone is asked to stop.

Each has one device; what they make together is, bit by bit, what one process with two devices makes
that nothing happens to.
"""

import json
import shutil
import signal
import socket
import time

import pytest

from t2i_jax import checkpoint
from t2i_jax.training.preemption import EXIT_PREEMPTED
from t2i_jax.training.watchdog import EXIT_STALLED
from tests import tiny
from tests.processes import (
    EVERY,
    STEPS,
    VALIDATE,
    Training,
    at,
    last_state,
    saves_of_the_last_start,
)

DEADLINE = ("--config.train.step_deadline=20",)
HEARTBEATS, SLOW = 100, 60  # seconds: until JAX misses a process, and for a busy machine


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Two:
    """Both processes of a run in a working directory."""

    def __init__(self, workdir, cache, *flags, fill=False, until=None):
        where = f"--coordinator=127.0.0.1:{free_port()}"
        self.all = [
            Training(
                workdir,
                cache,
                where,
                "--num_processes=2",
                f"--process_id={i}",
                *flags,
                devices=1,
                fill=fill and i == 0,
                name=f"_{i}",
            )
            for i in range(2)
        ]
        self.all[0].wait_for(until or at(0))

    def end(self):
        """Their exit statuses; they end by themselves."""
        try:
            return [training.end() for training in self.all]
        finally:
            for training in self.all:
                training.process.kill()

    def output(self):
        return "\n".join(training.output() for training in self.all)


def between(step, saved):
    """Past what was saved, and nothing but steps comes next."""
    return step > saved and step % EVERY in (1, 2, 3) and 1 <= step % VALIDATE <= 6


def _later(folder, names):
    """What is not there yet when the language model has been trained."""
    return {"checkpoints", "history.jsonl", "metrics.jsonl", "tensorboard"}.intersection(names)


class Hurt:
    """What happened to the two in one working directory, time after time."""

    def __init__(self, workdir, cache):
        self.workdir = workdir
        shutil.copytree(workdir.with_name("undisturbed"), workdir, ignore=_later)
        two = Two(workdir, cache, fill=True)
        two.all[0].wait_for(lambda t: t.steps() >= 9)
        two.all[1].process.kill()
        begun = time.monotonic()
        self.killed = two, two.end()
        self.killed_took = time.monotonic() - begun

        two = Two(workdir, cache)
        two.all[1].process.send_signal(signal.SIGTERM)
        self.asked = two, two.end()
        self.saved = checkpoint.find(workdir)[1]
        self.asked_saves = saves_of_the_last_start(workdir)

        two = Two(workdir, cache, *DEADLINE)
        two.all[0].wait_for(lambda t: between(t.steps(), self.saved))
        two.all[1].process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        self.stalled = two, two.all[0].end()
        self.stalled_took = time.monotonic() - begun
        two.all[1].process.kill()
        two.all[1].process.wait()

        two = Two(workdir, cache)
        self.last = two, two.end()


@pytest.fixture(scope="module")
def hurt(undisturbed):
    return Hurt(undisturbed.parent / "two", undisturbed.parent / "programs_of_two")


def test_where_one_is_killed_the_other_ends(hurt):
    two, codes = hurt.killed
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), two.output()
    assert hurt.killed_took < HEARTBEATS + SLOW


def test_where_one_stalls_the_other_is_ended_by_its_watchdog(hurt):
    two, code = hurt.stalled
    said = two.all[0].output()
    if code == -signal.SIGABRT:  # it was in a pause, and JAX missed the other first
        assert "stopped sending heartbeats" in said
    else:
        assert code == EXIT_STALLED, two.output()
        assert "has taken more than 20 seconds (train.step_deadline" in said
        assert "in _run" in (hurt.workdir / "stacks_host_0000.txt").read_text()
    assert hurt.stalled_took < HEARTBEATS + SLOW


def test_where_one_is_asked_to_stop_both_save_the_same_step(hurt):
    two, codes = hurt.asked
    assert codes == [EXIT_PREEMPTED] * 2, two.output()
    for training in two.all:
        assert f"Stopped by SIGTERM after step {hurt.saved}, which is saved" in training.output()
    assert hurt.stalled[0].all[0].resumed() == hurt.saved
    *regular, last = hurt.asked_saves
    assert last == hurt.saved and all(step % EVERY == 0 for step in regular)


def test_where_one_is_asked_before_the_first_step_both_end_alike(undisturbed):
    parent, long = undisturbed.parent, "--config.pretrain.steps=5000"
    begun = lambda training: "language model 10/" in training.output()  # noqa: E731
    two = Two(parent / "two_begin", parent / "programs_of_two", long, until=begun)
    two.all[1].process.send_signal(signal.SIGTERM)
    assert two.end() == [EXIT_PREEMPTED] * 2, two.output()
    for training in two.all:
        assert "while the language model was pre-trained, which begins anew" in training.output()
        assert "Traceback" not in training.output()


def test_in_the_end_all_is_as_of_one_process_left_alone(undisturbed, hurt):
    """Killed, asked to stop, stalled and started again: every number, and the last state."""
    two, codes = hurt.last
    assert codes == [0, 0], two.output()
    texts = [(workdir / "metrics.jsonl").read_text() for workdir in (undisturbed, hurt.workdir)]
    assert texts[0] == texts[1]
    losses = [e["step"] for e in map(json.loads, texts[1].splitlines()) if "loss" in e]
    assert losses == list(range(1, STEPS + 1))
    tiny.equal(last_state(hurt.workdir), last_state(undisturbed))
