"""Ends a process that no longer gets on, and says where it stands."""

from collections.abc import Callable
import faulthandler
import os
import sys
import tempfile
import threading
import time

from etils import epath
import jax

EXIT_STALLED = 124  # as of timeout(1)
_STDERR = 2
_LAST_WORDS = 30.0  # seconds that writing the stacks may take; the disk may be what hangs


class Watchdog:
    """Watches that what is expected next comes in time.

        with Watchdog(workdir, step=60.0, pause=3600.0) as dog:
            dog.expect("step 1", pause=True)  # it compiles
            ...
            dog.expect("step 2")

    Where it does not, the Python stacks of all threads go to stderr and to
    <workdir>/stacks_host_N.txt, and the process ends with EXIT_STALLED, whatever it is waiting for.
    A process that does not even let threads run (C code that keeps the interpreter's lock) is ended
    by faulthandler, with 1, one more deadline and half a minute later.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: float,
        pause: float,
        end: Callable[[int], None] = os._exit,
    ):
        """`step` and `pause` are seconds: of a step, and of what is rare and slow; 0 = any."""
        self._file = epath.Path(workdir) / f"stacks_host_{jax.process_index():04d}.txt"
        self._seconds, self._end = {False: step, True: pause}, end
        self._changed = threading.Condition()
        self._closed = False
        self._what, self._limit, self._deadline = "", 0.0, None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def expect(self, what: str, *, pause: bool = False) -> None:
        """What was expected has come; `what` is next, within the seconds of a step, or a pause."""
        with self._changed:
            self._what, self._limit = what, self._seconds[pause]
            self._deadline = time.monotonic() + self._limit if self._limit else None
            self._stand_in()
            self._changed.notify()

    def close(self) -> None:
        """Nothing is expected any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._bite()
                    break
                self._changed.wait(left)
        faulthandler.cancel_dump_traceback_later()

    def _stand_in(self) -> None:
        """Arms faulthandler, which needs no interpreter, for when the thread cannot run."""
        faulthandler.cancel_dump_traceback_later()
        if self._limit:
            seconds = 2 * self._limit + _LAST_WORDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _bite(self) -> None:
        with open(os.devnull, "wb") as nothing:
            faulthandler.dump_traceback_later(_LAST_WORDS, exit=True, file=nothing)
            try:
                print(
                    f"{self._what} has taken more than {self._limit:g} seconds "
                    "(train.step_deadline, train.pause_deadline): something hangs. The process "
                    f"ends now, with {EXIT_STALLED}. What its threads do, also in {self._file}:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(_STDERR, all_threads=True)
                with tempfile.TemporaryFile() as stacks:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    stacks.seek(0)
                    self._file.write_bytes(stacks.read())
            finally:
                self._end(EXIT_STALLED)
