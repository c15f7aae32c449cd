"""SIGTERM is noted, not obeyed at once; before there is anything to save, it ends the run."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from t2i_jax.training.preemption import EXIT_PREEMPTED, PreemptedError, Preemption

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LIMIT = 240  # seconds, for one process on a busy machine


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_first_step_it_ends_the_run():
    message = "Stopped by SIGTERM before the first step; nothing was lost"
    with pytest.raises(PreemptedError, match=message) as caught, Preemption(alone=True):
        terminate()
    assert caught.value.exit_code == EXIT_PREEMPTED == 75


def test_in_training_it_is_noted_however_often():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(alone=True) as preemption:
        preemption.wait_for_step()
        assert not preemption.asked
        for _ in range(3):
            terminate()
            assert preemption.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_of_several_notes_it_until_all_meet():
    with Preemption(alone=False) as preemption:
        terminate()
        assert preemption.asked
        preemption.when = "on the way"
        assert str(preemption.error) == "Stopped by SIGTERM on the way."


def test_in_another_thread_nothing_is_installed():
    seen = []

    def run():
        with Preemption(alone=True) as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.asked))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


class Process:
    """A process that ends by itself when it is told to."""

    def __init__(self, *command, cwd):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._status = pathlib.Path(f"/proc/{self._process.pid}/status")

    def wait_for(self, condition):
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self._process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    def hears(self):
        """Whether it has a handler of SIGTERM."""
        caught = re.search(r"SigCgt:\s+(\w+)", self._status.read_text())[1]
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    def told(self):
        """(its exit status, what it said) after a SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        try:
            said = self._process.communicate(timeout=LIMIT)[0]
            return self._process.returncode, said
        finally:
            self._process.kill()


TRAIN = (ROOT / "launch" / "train.py", f"--config={ROOT / 'configs' / 'scenes.py'}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_that_has_hardly_started(tmp_path):
    training = Process(*TRAIN, cwd=tmp_path)
    training.wait_for(training.hears)
    code, said = training.told()
    assert code == EXIT_PREEMPTED and "Stopped by SIGTERM; no step was being made." in said
    assert not any(tmp_path.iterdir())


def test_training_that_waits_for_the_others(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    several = f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"
    training = Process(*TRAIN, *several, cwd=tmp_path)

    def listens():
        with socket.socket() as call:
            return call.connect_ex(("127.0.0.1", port)) == 0

    training.wait_for(listens)
    code, said = training.told()
    assert code == EXIT_PREEMPTED and "Traceback" not in said


STARTED = """
import os, signal, sys, time
from t2i_jax import distributed
from t2i_jax.training import preemption
preemption.exit_at_once()
distributed.find = lambda *given: distributed.Place("127.0.0.1:" + sys.argv[1], 1, 0)
distributed.start({})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
print("goes on")
"""


def test_once_jax_has_started_several_it_still_ends(tmp_path):
    """JAX has a handler of its own, which only notes that it was called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", STARTED, str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == EXIT_PREEMPTED, done.stdout + done.stderr
