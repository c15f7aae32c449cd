"""How far long work has come, and how long it will take."""

from collections.abc import Callable
import sys
import time
from typing import TextIO

import tqdm


class Progress:
    """A bar on stderr; where that is no terminal, a plain line every `interval` seconds.

        progress = Progress(total=1000, start=250, images=128)
        progress.update(step, loss=0.12)

    Speed is that since the last time shown; the time left is by the speed since the first update,
    which comes after the first, compiling, step.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        images: int = 1,
        *,
        name: str = "training",
        unit: str = "images",
        interval: float = 10.0,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`images`, or what `unit` says, are those of one step. Unless `shown`, it is silent."""
        self._total, self._images, self._name, self._unit = total, images, name, unit
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._silent = not shown
        self._first = self._last = None  # (step, time)
        self._bar = None
        self._interval = interval
        if shown and self._stream.isatty():
            self._interval = 0.5
            self._bar = tqdm.tqdm(
                total=total,
                initial=start,
                desc=name,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, **shown: float) -> None:
        """After `step` steps; `shown` are numbers like loss=0.12."""
        now = self._clock()
        if self._first is None:
            self._first = self._last = (step, now)
            self._show(step, [f"{name} {value:.4f}" for name, value in shown.items()])
        elif now - self._last[1] >= self._interval or step >= self._total:
            parts = [f"{name} {value:.4f}" for name, value in shown.items()]
            self._show(step, parts + self._speed(step, now))
            self._last = (step, now)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _speed(self, step: int, now: float) -> list[str]:
        (first_step, first), (last_step, last) = self._first, self._last
        if step <= last_step or now <= last:
            return []
        rate = (step - last_step) * self._images / (now - last)
        left = (self._total - step) * (now - first) / (step - first_step)
        return [f"{rate:.{0 if rate >= 100 else 1}f} {self._unit}/s", f"{_duration(left)} left"]

    def _show(self, step: int, parts: list[str]) -> None:
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            text = ", ".join([f"{self._name} {step}/{self._total}", *parts])
            print(text, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
