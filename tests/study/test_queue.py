"""Jobs on devices: real processes, bound, asked to stop, and gone with who started them."""

import itertools
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from t2i_jax.errors import ConfigError, UserError
from t2i_jax.study import queue
from t2i_jax.study.queue import Job, Slot
from t2i_jax.training.preemption import PreemptedError

ROOT = Path(__file__).resolve().parents[2]
PLACES = [Slot("one", {"WHERE": "1"}), Slot("two", {"WHERE": "2"})]


def job(tmp_path, name, program):
    return Job(name, [sys.executable, "-c", program], tmp_path / "logs" / f"{name}.log")


def test_every_job_runs_once_two_at_a_time(tmp_path):
    program = "import os, time; print(os.environ['WHERE'], time.time()); time.sleep(0.3)"
    jobs = [job(tmp_path, str(i), f"{program}; print(time.time())") for i in range(5)]
    found = {done.job.name: done for done in queue.run(jobs, PLACES)}
    assert sorted(found) == list("01234") and {done.status for done in found.values()} == {0}
    spans = []
    for one in jobs:
        where, start, end = one.log.read_text().split()
        spans.append((where, float(start), float(end)))
    for where in "12":  # on one device never two at once
        own = sorted(span[1:] for span in spans if span[0] == where)
        assert own and all(a[1] <= b[0] for a, b in itertools.pairwise(own))
    assert all(done.seconds >= 0.3 for done in found.values())


def test_a_job_that_fails_is_told_and_others_go_on(tmp_path):
    jobs = [job(tmp_path, "bad", "raise SystemExit(3)"), job(tmp_path, "good", "print('fine')")]
    assert {done.job.name: done.status for done in queue.run(jobs, PLACES)} == {"bad": 3, "good": 0}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
def test_a_core_is_bound_to_and_what_is_imported_is_this_checkout(tmp_path):
    core = min(os.sched_getaffinity(0))
    program = "import os, t2i_jax; print(os.sched_getaffinity(0), t2i_jax.__path__[0])"
    one = job(tmp_path, "bound", program)
    (done,) = queue.run([one], [Slot("core", {}, core)])
    assert done.status == 0
    assert one.log.read_text().strip() == f"{{{core}}} {ROOT / 't2i_jax'}"


def test_here_every_core_is_a_device():
    found = queue.slots()
    assert len(found) == len(os.sched_getaffinity(0))
    assert all("device_count=1" in slot.environ["XLA_FLAGS"] for slot in found)
    assert all(slot.environ["JAX_PLATFORMS"] == "cpu" for slot in found)


def test_as_many_at_a_time_as_asked_for(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert len(queue.slots(1)) == 1
    with pytest.raises(ConfigError, match=f"there are {cores} cores"):
        queue.slots(cores + 1)
    monkeypatch.setattr(queue, "_LOOK", """print('["gpu", "NVIDIA H200", 2]')""")
    shared = queue.slots(4)
    assert [slot.environ["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0", "1", "0", "1"]
    assert {slot.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in shared} == {"0.45"}
    with pytest.raises(ConfigError, match="--parallel=3"):
        queue.slots(3)


def test_no_device_at_all_is_told(monkeypatch):
    monkeypatch.setattr(queue, "_LOOK", "raise SystemExit('no backend')")
    with pytest.raises(UserError, match="no backend"):
        queue.slots()


def test_other_devices_are_shown_one_by_one(monkeypatch):
    monkeypatch.setattr(queue, "_LOOK", """print('["gpu", "NVIDIA H200", 2]')""")
    assert [(slot.name, slot.environ, slot.core) for slot in queue.slots()] == [
        ("NVIDIA H200 0", {"CUDA_VISIBLE_DEVICES": "0"}, None),
        ("NVIDIA H200 1", {"CUDA_VISIBLE_DEVICES": "1"}, None),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot.environ["CUDA_VISIBLE_DEVICES"] for slot in queue.slots()] == ["5", "7"]
    monkeypatch.setattr(queue, "_LOOK", """print('["tpu", "TPU v4", 4]')""")
    assert [slot.environ["TPU_VISIBLE_CHIPS"] for slot in queue.slots()] == list("0123")


OUTER = """
import sys
from pathlib import Path
from t2i_jax.study import queue
from t2i_jax.study.queue import Job, Slot
folder = Path(sys.argv[1])
program = '''
import signal, sys, time
from pathlib import Path
from t2i_jax.study import worker
import threading
folder = Path(sys.argv[1])
def stop(*_):
    (folder / "asked").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
threading.Thread(target=worker._leave_with_parent, daemon=True).start()
(folder / "started").write_text(str(__import__("os").getpid()))
time.sleep(60)
'''
command = [sys.executable, "-c", program, str(folder)]
jobs = [Job(str(i), command, folder / f"{i}.log") for i in range(2)]
try:
    for done in queue.run(jobs, [Slot("one", {})]):
        print("ended", done.job.name, done.status, flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def outer(tmp_path):
    """A process that runs a queue, with a worker that has started; and that worker's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", OUTER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    _wait(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
    yield process, int((tmp_path / "started").read_text())
    process.kill()
    process.wait()


def _wait(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"


def test_a_worker_is_gone_with_a_killed_queue(outer, tmp_path):
    process, worker = outer
    process.send_signal(signal.SIGKILL)
    _wait(lambda: not _alive(worker))
    assert not (tmp_path / "asked").exists()


def test_a_command_in_the_foreground_is_asked_to_stop_too(tmp_path):
    program = "import signal, sys, time; from pathlib import Path; "
    program += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    program += f"Path({str(tmp_path / 'started')!r}).write_text('x'); time.sleep(60)"
    outer = "import sys; from t2i_jax.study import queue; "
    outer += "sys.exit(queue.foreground([sys.executable, '-c', sys.argv[1]]))"
    process = subprocess.Popen([sys.executable, "-c", outer, program], cwd=ROOT)
    _wait((tmp_path / "started").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_request_to_stop_is_handed_on_and_waited_for(outer, tmp_path):
    process, _ = outer
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert told.startswith(PreemptedError.__name__)  # the first is stopped, the second never began
    assert (tmp_path / "asked").exists()
