"""The list of bad samples, their count, and the limit."""

import numpy as np

from t2i_jax import jsonlines
from t2i_jax.data.bad import Cause
from t2i_jax.data.samples import Fault
from t2i_jax.training import faults

ONE = Fault(0, 5, "a.tar/1", "broken_image", "no image")
TWO = Fault(1, 11, "a.tar/2", "empty_caption", "nothing")
HELD_OUT = Fault(-1, 3, "a.tar/9", "tiny_image", "1 x 1")


def test_every_fault_is_a_line_and_resuming_continues(tmp_path):
    log = faults.FaultLog(tmp_path, host=2, hosts=3)
    log.add(0, [HELD_OUT])
    log.add(1, [ONE])
    log.add(2, [TWO, ONE])
    log.add(2, [HELD_OUT])  # told before
    log.close()
    entries = jsonlines.read(tmp_path / "bad_samples" / "host_0002.jsonl")
    assert [(e["step"], e["sample"]) for e in entries] == [
        (0, "a.tar/9"),
        (1, "a.tar/1"),
        (2, "a.tar/2"),
        (2, "a.tar/1"),
    ]
    assert entries[1] == {**ONE._asdict(), "step": 1}
    assert entries[0]["position"] is None
    resumed = faults.FaultLog(tmp_path, host=2, hosts=3, resume_step=1)
    resumed.add(1, [HELD_OUT])
    resumed.add(2, [TWO, ONE])
    resumed.close()
    assert faults.newest(tmp_path)[-1] == "a.tar/1: broken_image, no image"
    assert jsonlines.read(tmp_path / "bad_samples" / "host_0002.jsonl") == entries


def test_counts_of_all_hosts_go_on_after_a_resume(tmp_path):
    for host in range(2):
        log = faults.FaultLog(tmp_path, host, hosts=2)
        log.add(0, [HELD_OUT])
        log.add(1, [ONE])
        log.add(5, [TWO])
        log.close()
    found = dict(zip(Cause, faults.count(tmp_path, 4).tolist(), strict=True))
    assert found == dict.fromkeys(Cause, 0) | {Cause.BROKEN_IMAGE: 2}
    assert faults.count(tmp_path, 5).sum() == 4
    assert faults.count(tmp_path / "none", 5).sum() == 0
    counted = faults.FaultCount(0.5, 8, faults.count(tmp_path, 4))
    assert counted.metrics() == {"bad_samples": 2, "bad_samples/broken_image": 2}
    assert faults.FaultCount(0.5, 8).metrics() == {}


def test_hosts_that_are_no_more_leave_nothing_behind(tmp_path):
    for host in range(5):
        log = faults.FaultLog(tmp_path, host, hosts=5)
        log.add(1, [ONE])
        log.add(9, [TWO])
        log.close()
    for host in range(2):  # resumed at step 4 by two hosts
        faults.FaultLog(tmp_path, host, hosts=2, resume_step=4).close()
    assert faults.count(tmp_path, 100).sum() == 5


def _of(count):
    return np.array([count] + [0] * (len(Cause) - 1))


def test_the_limit_is_a_share_of_the_newest_samples():
    one = faults.FaultCount(0.05, 20)  # 100 of 2,000 samples, which are 100 steps
    for _ in range(300):
        one.add(_of(1))  # a twentieth
    assert not one.too_many
    one.add(_of(2))
    assert one.too_many
    one.add(_of(0))
    for _ in range(99):
        one.add(_of(1))
    assert not one.too_many  # what is old is forgotten
    at_once = faults.FaultCount(0.05, 20)
    for step in range(10):
        at_once.add(_of(11))
        assert at_once.too_many == (step == 9)  # 110 of the first 200
    assert not faults.FaultCount(1.0, 20).too_many
