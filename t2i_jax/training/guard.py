"""What keeps a run safe: a watchdog, SIGTERM heard, its history written, full disks explained."""

from collections.abc import Iterator, Mapping
import contextlib
import errno

from etils import epath
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

from t2i_jax.damage import StorageError
from t2i_jax.training.history import History
from t2i_jax.training.preemption import PreemptedError, Preemption
from t2i_jax.training.watchdog import Watchdog

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Guard:
    """Open from the start of a run to its end; the loop tells it what it does.

    Raises, where it is left by an OSError of a full disk, a StorageError instead.
    """

    def __init__(self, config: ConfigDict, workdir: epath.PathLike):
        self._workdir = workdir
        self._history = History(workdir) if jax.process_index() == 0 else None
        self._preemption = Preemption(alone=jax.process_count() == 1)
        limits = config.train
        self._dog = Watchdog(workdir, step=limits.step_deadline, pause=limits.pause_deadline)
        self._open = contextlib.ExitStack()
        self._step = 0
        self._shapes = set()

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop, by SIGTERM."""
        return self._preemption.asked

    def meet(self, what: str) -> None:
        """Before the first step: all processes are here, and `what` is next, a pause.

        Raises PreemptedError, in all of them, where one was asked to stop.
        """
        self._dog.expect(what, pause=True)
        asked = np.array([self._preemption.asked])
        if jax.process_count() > 1 and multihost_utils.process_allgather(asked).any():
            raise self._preemption.error

    @contextlib.contextmanager
    def pretraining(self) -> Iterator[None]:
        """Around the pre-training of the language model."""
        before = self._preemption.when
        self._preemption.when = "while the language model was pre-trained, which begins anew"
        self.meet("pre-training the language model")
        yield
        self._preemption.when = before

    @contextlib.contextmanager
    def setup(self) -> Iterator[None]:
        """Around all that is between the text side and the first batch."""
        self.meet("setting up")
        yield
        self.meet("the first batch")
        self._preemption.wait_for_step()

    def step(self, number: int, arrays: Mapping[str, jax.Array]) -> bool:
        """The batch of a step is here. Returns whether its shape is new: the step will compile."""
        shapes = frozenset((name, array.shape) for name, array in arrays.items())
        compiles = shapes not in self._shapes
        self._dog.expect(f"step {number}", pause=compiles)
        self._shapes.add(shapes)
        self._step = number
        return compiles

    def ready(self, start: int) -> None:
        """The first step after `start` is done."""
        if self._history:
            self._history.ready(start)

    def goodput(self) -> float:
        """That of the run until now; in process 0 alone."""
        assert self._history is not None
        return self._history.goodput()

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Around what is no step, and may take longer."""
        self._dog.expect(f"{what} at step {self._step}", pause=True)
        with self._history.pause() if self._history else contextlib.nullcontext():
            yield
        self._dog.expect(f"the data after step {self._step}")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around the start of saving the step."""
        if self._history:
            self._history.saved(self._step)
        with self.pause("saving"):
            yield

    def stopped(self) -> PreemptedError:
        """What is raised when the step is saved because somebody was asked to stop."""
        return PreemptedError(
            f"Stopped by SIGTERM after step {self._step}, which is saved; start again to go on."
        )

    def leaving(self) -> None:
        """The last step is done; what is being saved is waited for."""
        self._dog.expect(f"the last checkpoint, at step {self._step}", pause=True)

    def __enter__(self) -> "Guard":
        self._open.enter_context(self._dog)
        self._open.enter_context(self._preemption)
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._open:  # until it is written down
            if self._history:
                with contextlib.suppress(OSError):  # of the disk that ended the run
                    self._history.ended(self._step, kind.__name__ if kind else "finished")
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageError(
                f"Step {self._step}: cannot write in {self._workdir}: {error}. The newest "
                "checkpoint is intact. Make room, and start again."
            ) from error
