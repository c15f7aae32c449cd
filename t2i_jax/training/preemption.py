"""SIGTERM, with which machines are taken away: the run saves at a step of all processes, and ends.

A process alone stops after the step that it is at. Of several, those that were asked say so in the
batches that they send (`stop` in feed.py), and every process reads in the metrics of the same step
that somebody was: no message of its own is needed, and it does not matter who was asked.

Before the first step there is nothing to save. A process that is alone ends at once; of several,
those that were asked say so where all meet (guard.py), so that all end with the same status. And
before a run is open at all, `exit_at_once` ends whoever is asked.
"""

import os
import signal
import threading

from t2i_jax.errors import UserError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: try again


class PreemptedError(UserError):
    """The run was asked to stop, and did."""

    exit_code = EXIT_PREEMPTED


def exit_at_once() -> None:
    """From now on SIGTERM ends the process with EXIT_PREEMPTED, but while a Preemption is open.

    For a process that is about to train. Without a handler it would end with another status, or, as
    the first one of a container, not at all. An exception would be less certain: whatever is being
    imported or waited for may catch it.
    """
    signal.signal(signal.SIGTERM, _exit)


def _exit(*_) -> None:
    os.write(2, b"Stopped by SIGTERM; no step was being made.\n")
    os._exit(EXIT_PREEMPTED)


class Preemption:
    """Notes SIGTERM while it is open; further ones change nothing.

    Where the process is `alone`, a SIGTERM raises `error` at once until `wait_for_step`.

    Attributes:
      asked: whether this process was.
      when: where the run is before its first step, and what of it is lost.
    """

    def __init__(self, *, alone: bool):
        self.asked = False
        self.when = "before the first step; nothing was lost"
        self._at_once = alone
        self._installed, self._before = False, None

    @property
    def error(self) -> PreemptedError:
        """What is raised before the first step."""
        return PreemptedError(f"Stopped by SIGTERM {self.when}.")

    def wait_for_step(self) -> None:
        """From now on it is for the loop to look at `asked`."""
        self._at_once = False

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(self, *exc_info) -> None:
        if self._installed:  # before it there may have been JAX's, which Python knows nothing of
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _note(self, *_) -> None:
        first, self.asked = not self.asked, True
        if first and self._at_once:
            raise self.error
