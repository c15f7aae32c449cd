"""When a run was started, what it saved and how it ended: <workdir>/history.jsonl.

One line an event, of all starts, never changed afterwards:

    {"event": "start", "step": 0, "time": ...}
    {"event": "ready", "step": s, "time": ...}               resumed at s; the first step is done
    {"event": "saved", "step": n, "time": ..., "paused": p}  step n is done, and will be saved
    {"event": "end", "step": n, "time": ..., "paused": p, "cause": c}

`time` is in seconds since 1970, `paused` the seconds since "ready" that did not go into steps:
validation, pictures, waiting for a checkpoint. A killed process leaves no "end".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import sys
import time
from typing import Any

from etils import epath

from t2i_jax import jsonlines
from t2i_jax.jsonlines import JsonLines

FILE = "history.jsonl"


class History:
    """Writes the events of one process; one process of a run writes."""

    def __init__(self, workdir: epath.PathLike, clock: Callable[[], float] = time.time):
        self._lines = JsonLines(epath.Path(workdir) / FILE, sys.maxsize, interval=0.0)
        self._events = list(self._lines.kept)
        self._clock = clock
        self._paused = 0.0
        self._write("start", 0)

    def ready(self, step: int) -> None:
        """The first step after `step` is done: from now on steps take their time."""
        self._write("ready", step)
        self._paused = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no step."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def saved(self, step: int) -> None:
        """`step` is done, and now it is saved."""
        self._write("saved", step, paused=self._paused)

    def goodput(self) -> float:
        """That of the run until now."""
        return _goodput(self._events, self._clock())

    def ended(self, step: int, cause: str) -> None:
        """The last event; `cause` is 'finished' or the name of an error."""
        self._write("end", step, paused=self._paused, cause=cause)
        self._lines.close()

    def _write(self, event: str, step: int, **values: Any) -> None:
        self._events.append({"event": event, "step": step, "time": self._clock(), **values})
        self._lines.append(self._events[-1])


def goodput(workdir: epath.PathLike, now: float | None = None) -> float:
    """The share of the time since the first start that went into steps which were kept.

    Steps that a later start made again were not kept. Of a run that goes on (its last start has no
    "end") the time until `now`, which by default is that of the last event, is that of steps, but
    for the pauses up to its last checkpoint. Setting up and compiling the first step are no steps.
    """
    events = jsonlines.read(epath.Path(workdir) / FILE)
    return _goodput(events, events[-1]["time"] if now is None else now)


def seconds(workdir: epath.PathLike) -> float:
    """How long the starts of a run have taken together, each until its last event."""
    events = jsonlines.read(epath.Path(workdir) / FILE)
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    spans = zip(starts, [*starts[1:], len(events)], strict=True)
    return sum(events[last - 1]["time"] - events[first]["time"] for first, last in spans)


def _goodput(events: Sequence[Mapping[str, Any]], now: float) -> float:
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    good, kept = 0.0, None  # up to which step, as what came later says
    for first, last in reversed(list(zip(starts, [*starts[1:], len(events)], strict=True))):
        run = {event["event"]: event for event in events[first:last]}
        if "ready" not in run:
            continue
        done = [event for event in events[first:last] if event["event"] == "saved"]
        if kept is None and "end" not in run:
            paused = done[-1]["paused"] if done else 0.0
            good += now - run["ready"]["time"] - paused
        else:
            done = [event for event in done if kept is None or event["step"] <= kept]
            if done:
                good += done[-1]["time"] - run["ready"]["time"] - done[-1]["paused"]
        resumed = run["ready"]["step"]
        kept = resumed if kept is None else min(kept, resumed)
    whole = now - events[starts[0]]["time"]
    return good / whole if whole > 0 else 0.0
