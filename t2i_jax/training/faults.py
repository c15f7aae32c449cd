"""Samples that could not be used: all on a list, counted, and no more of them than is allowed."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
import numpy as np

from t2i_jax import jsonlines
from t2i_jax.data.bad import Cause
from t2i_jax.data.samples import Fault
from t2i_jax.errors import UserError
from t2i_jax.jsonlines import JsonLines

FOLDER = "bad_samples"
WINDOW = 2_000  # newest samples among which the rate is taken
_SHOWN = 10  # of the samples named in a message


class DataError(UserError):
    """More of the data is bad than the config allows."""


class FaultLog:
    """<workdir>/bad_samples/host_N.jsonl: every sample that this host could not use, by name.

    What hosts that are no more wrote after `resume_step` is dropped too.
    """

    def __init__(
        self, workdir: epath.PathLike, host: int = 0, hosts: int = 1, resume_step: int = 0
    ):
        folder = epath.Path(workdir) / FOLDER
        self._lines = JsonLines(folder / f"host_{host:04d}.jsonl", resume_step)
        for file in folder.glob("host_*.jsonl"):
            number = int(file.stem.removeprefix("host_"))
            if number >= hosts and number % hosts == host:
                JsonLines(file, resume_step).close()
        # Outside of the stream of training a sample is told once, however often it is met.
        self._told = {entry["sample"] for entry in self._lines.kept if entry["position"] is None}

    def add(self, step: int, faults: Iterable[Fault]) -> None:
        """Those of a batch; `step` is the number of the step that it is for, 0 before the first."""
        for fault in faults:
            entry = {**fault._asdict(), "step": step}
            if fault.step < 0:
                entry["position"] = None
                if fault.sample in self._told:
                    continue
                self._told.add(fault.sample)
            self._lines.append(entry)

    def flush(self) -> None:
        """The lines so far are stored after it."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


class FaultCount:
    """How many samples were bad, by cause, of all hosts, and whether that is more than `max_rate`.

    Attributes:
      total_C: int64 (causes,), since the run began; `start` are those before this process.
    """

    def __init__(self, max_rate: float, batch_size: int, start: Sequence[int] | None = None):
        self.total_C = np.zeros(len(Cause), np.int64) if start is None else np.array(start)
        self._steps: deque[int] = deque(maxlen=max(1, WINDOW // batch_size))
        self._limit = max_rate * max(WINDOW, batch_size)

    def add(self, bad_C: np.ndarray) -> None:
        """Those of one step."""
        self.total_C = self.total_C + bad_C
        self._steps.append(int(bad_C.sum()))

    @property
    def too_many(self) -> bool:
        return sum(self._steps) > self._limit

    def metrics(self) -> dict[str, int]:
        """{'bad_samples': ..., 'bad_samples/<cause>': ...} since the run began, if there are."""
        named = zip(Cause, self.total_C.tolist(), strict=True)
        found = {f"bad_samples/{cause}": count for cause, count in named if count}
        return {"bad_samples": int(self.total_C.sum()), **found} if found else {}


def newest(workdir: epath.PathLike) -> list[str]:
    """What all hosts' lists have of the newest steps, for a message."""
    found = sorted(_entries(workdir), key=lambda entry: entry["step"])
    return [f"{e['sample']}: {e['cause']}, {e['detail']}" for e in found[-_SHOWN:]]


def count(workdir: epath.PathLike, step: int) -> np.ndarray:
    """What all hosts' lists have of the training batches up to `step`, by cause: (causes,)."""
    found = Counter(
        entry["cause"]
        for entry in _entries(workdir)
        if entry["step"] <= step and entry["position"] is not None
    )
    return np.array([found[str(cause)] for cause in Cause], np.int64)


def _entries(workdir: epath.PathLike) -> list[dict[str, Any]]:
    folder = epath.Path(workdir) / FOLDER
    files = sorted(folder.glob("host_*.jsonl")) if folder.exists() else []
    return [entry for file in files for entry in jsonlines.read(file)]
