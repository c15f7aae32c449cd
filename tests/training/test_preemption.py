"""SIGTERM is noted, not obeyed at once; before there is anything to save, it ends the run."""

import os
import signal
import threading

import pytest

from t2i_jax.training.preemption import EXIT_PREEMPTED, PreemptedError, Preemption


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_first_step_it_ends_the_run():
    with pytest.raises(PreemptedError, match="before the first step") as caught, Preemption():
        terminate()
    assert caught.value.exit_code == EXIT_PREEMPTED == 75


def test_in_training_it_is_noted_however_often():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        preemption.wait_for_step()
        assert not preemption.asked
        for _ in range(3):
            terminate()
            assert preemption.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_nothing_is_installed():
    seen = []

    def run():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.asked))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
