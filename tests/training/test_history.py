"""Goodput is the share of the time that went into steps which were kept, in closed forms."""

import json

import pytest

from t2i_jax.training.history import History, goodput
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock()


def start(path, clock, step, setup):
    """A start at `step` whose set-up takes `setup` seconds."""
    history = History(path, clock)
    clock.now += setup
    history.ready(step)
    return history


def steps(history, clock, seconds, saved=None, pause=0.0):
    """Steps for `seconds`, after which `saved` is saved, with a pause afterwards."""
    clock.now += seconds
    if saved is not None:
        history.saved(saved)
    with history.pause():
        clock.now += pause


def test_one_run_to_its_end(tmp_path, clock):
    history = start(tmp_path, clock, 0, setup=20)
    steps(history, clock, 30, saved=10, pause=10)
    steps(history, clock, 30, saved=20, pause=10)
    history.ended(20, "finished")
    assert goodput(tmp_path) == pytest.approx(60 / 100)
    assert goodput(tmp_path, now=1200.0) == pytest.approx(60 / 200)


def test_a_run_that_goes_on(tmp_path, clock):
    history = start(tmp_path, clock, 0, setup=20)
    steps(history, clock, 30, saved=10, pause=10)
    steps(history, clock, 30, saved=20)
    assert goodput(tmp_path, now=1100.0) == pytest.approx((100 - 20 - 10) / 100)


def test_what_is_made_again_does_not_count(tmp_path, clock):
    """Killed 25 seconds after checkpoint 10; the time until it is started again is lost, too."""
    history = start(tmp_path, clock, 0, setup=10)
    steps(history, clock, 40, saved=10, pause=5)
    clock.now += 25
    clock.now += 20  # nobody there
    history = start(tmp_path, clock, 10, setup=10)
    steps(history, clock, 90, saved=20)
    history.ended(20, "finished")
    assert clock.now == 1200
    assert goodput(tmp_path) == pytest.approx((40 + 90) / 200)


def test_a_checkpoint_that_was_not_good_takes_its_steps_along(tmp_path, clock):
    """The second start falls back behind the first one's last checkpoint, the third further."""
    history = start(tmp_path, clock, 0, setup=0)
    steps(history, clock, 10, saved=5)
    steps(history, clock, 20, saved=10)
    steps(history, clock, 30, saved=15)
    history = start(tmp_path, clock, 10, setup=10)
    steps(history, clock, 50, saved=20)
    history = start(tmp_path, clock, 5, setup=0)  # all of the second start is lost
    steps(history, clock, 80, saved=30)
    history.ended(30, "finished")
    assert clock.now == 1200
    assert goodput(tmp_path) == pytest.approx((10 + 80) / 200)


def test_starts_that_never_made_a_step(tmp_path, clock):
    history = start(tmp_path, clock, 0, setup=10)
    steps(history, clock, 30, saved=3)
    History(tmp_path, clock)
    clock.now += 50  # killed while it sets up
    history = start(tmp_path, clock, 3, setup=10)
    steps(history, clock, 100, saved=13)
    history.ended(13, "PreemptedError")
    assert goodput(tmp_path) == pytest.approx((30 + 100) / 200)


def test_a_line_that_was_not_finished_is_dropped(tmp_path, clock):
    history = start(tmp_path, clock, 0, setup=10)
    steps(history, clock, 40, saved=3)
    file = tmp_path / "history.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"event": "sav')
    assert goodput(tmp_path) == pytest.approx(40 / 50)
    start(tmp_path, clock, 3, setup=10)
    lines = file.read_text().splitlines()
    assert "\n".join(lines[:3]) + "\n" == whole
    assert [json.loads(line)["event"] for line in lines[3:]] == ["start", "ready"]
