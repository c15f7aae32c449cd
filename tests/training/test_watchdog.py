"""The watchdog bites when, and only when, what is expected does not come."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from t2i_jax.training.watchdog import EXIT_STALLED, Watchdog

LIMIT = 240  # seconds, for one process on a busy machine
LONG = 1e6


class Ends:
    """What takes the place of os._exit: notes the status."""

    def __init__(self):
        self.codes, self.came = [], threading.Event()

    def __call__(self, code):
        self.codes.append(code)
        self.came.set()


def test_a_step_that_does_not_come(tmp_path, capfd):
    ends = Ends()
    with Watchdog(tmp_path, step=0.05, pause=LONG, end=ends) as dog:
        dog.expect("step 7")
        assert ends.came.wait(LIMIT)
    assert ends.codes == [EXIT_STALLED]
    said = capfd.readouterr().err
    assert "step 7 has taken more than 0.05 seconds (train.step_deadline" in said
    stacks = (tmp_path / "stacks_host_0000.txt").read_text()
    for text in (stacks, said):
        assert "test_a_step_that_does_not_come" in text and "_bite" in text


def test_what_comes_in_time_is_left_alone(tmp_path, capfd):
    ends = Ends()
    with Watchdog(tmp_path, step=LONG, pause=0.05, end=ends) as dog:
        for number in range(200):
            dog.expect(f"step {number}")
        assert not ends.came.wait(0.2)
        dog.expect("validation", pause=True)
        assert ends.came.wait(LIMIT)
    assert "validation has taken more than 0.05 seconds" in capfd.readouterr().err


def test_a_pause_may_take_longer_than_a_step(tmp_path):
    ends = Ends()
    with Watchdog(tmp_path, step=0.05, pause=LONG, end=ends) as dog:
        dog.expect("compiling", pause=True)
        assert not ends.came.wait(0.3)
    assert not ends.codes


def test_zero_is_never_and_nothing_is_expected_at_first(tmp_path):
    ends = Ends()
    with Watchdog(tmp_path, step=0.0, pause=0.05, end=ends) as dog:
        assert not ends.came.wait(0.2)
        dog.expect("step 1")
        assert not ends.came.wait(0.2)
    assert not (tmp_path / "stacks_host_0000.txt").exists()


HANGS = """
import sys, threading, time
from t2i_jax.training import watchdog
watchdog._LAST_WORDS = 1.0
with watchdog.Watchdog(sys.argv[1], step=1.0, pause=0.0) as dog:
    dog.expect("step 3")
    {hang}
"""
# The interpreter's lock is never given away: no other thread of Python runs.
HOLDS_THE_LOCK = "sys.setswitchinterval(1e6)\n    while True: pass"


@pytest.mark.parametrize(
    ("hang", "code"),
    [("threading.Lock().acquire() and time.sleep(10_000)", EXIT_STALLED), (HOLDS_THE_LOCK, 1)],
    ids=["waits", "holds the lock"],
)
def test_a_real_process_ends_whatever_it_does(tmp_path, hang, code):
    command = [sys.executable, "-c", HANGS.format(hang=hang), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == code, done.stderr
    assert 'File "<string>", line' in done.stderr


def test_a_process_whose_messages_nobody_reads_ends_too(tmp_path):
    """Its stderr is a full pipe: writing the stacks never returns."""
    fill = "import os; os.set_blocking(2, False)\n"
    fill += "try:\n    while os.write(2, b'x' * 4096): pass\nexcept BlockingIOError: pass\n"
    text = fill + "os.set_blocking(2, True)" + HANGS.format(hang="time.sleep(10_000)")
    command = [sys.executable, "-c", text, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert process.wait(LIMIT) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.stderr.close()


def test_it_costs_a_step_little(tmp_path):
    with Watchdog(tmp_path, step=LONG, pause=LONG) as dog:
        start = time.process_time()
        for number in range(1000):
            dog.expect(f"step {number}")
        assert time.process_time() - start < 5  # a thousand steps
