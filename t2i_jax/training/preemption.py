"""SIGTERM, with which machines are taken away: the run saves at a step of all processes, and ends.

A process alone stops after the step that it is at. Of several, those that were asked say so in the
batches that they send (`stop` in feed.py), and every process reads in the metrics of the same step
that somebody was: no message of its own is needed, and it does not matter who was asked.
"""

import signal
import threading

from t2i_jax.errors import UserError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: try again


class PreemptedError(UserError):
    """The run was asked to stop, and did."""

    exit_code = EXIT_PREEMPTED


class Preemption:
    """Notes SIGTERM while it is open; further ones change nothing.

    Until `wait_for_step` a SIGTERM raises PreemptedError at once: there is nothing to save.

    Attributes:
      asked: whether this process was.
    """

    def __init__(self):
        self.asked = False
        self._running = False
        self._installed, self._before = False, None

    def wait_for_step(self) -> None:
        """From now on it is for the loop to look at `asked`."""
        self._running = True

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
        if first and not self._running:
            raise PreemptedError("Stopped by SIGTERM before the first step; nothing was lost.")
