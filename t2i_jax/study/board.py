"""The progress of a suite: a table of rows, redrawn in a terminal; lines where there is none."""

from collections.abc import Sequence
import sys
import time
from typing import Any, TextIO

from t2i_jax.study.queue import Done
from t2i_jax.study.suite import Run, Suite


class Board:
    """Shows what is done, and how long the rest will take."""

    def __init__(self, suite: Suite, seeds: Sequence[int], stream: TextIO | None = None):
        self._suite, self._seeds = suite, list(seeds)
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._cells: dict[tuple[str, int], str] = {}
        self._seconds: list[float] = []
        self._todo, self._places, self._drawn = 0, 1, 0
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A line."""
        print(text, file=self._stream, flush=True)
        self._drawn = 0

    def known(self, run: Run, entry: dict[str, Any]) -> None:
        """A run was done before."""
        self._cells[run.row.name, run.seed] = _result(entry)

    def begin(self, todo: int, places: int) -> None:
        """That many runs follow, on that many devices."""
        self._todo, self._places, self._began = todo, places, time.monotonic()
        self.say(f"runs: {len(self._cells)} done before, {todo} to do, {places} at a time")
        if self._terminal:
            self._draw()

    def done(self, run: Run, entry: dict[str, Any], seconds: float) -> None:
        """A run has ended."""
        self._seconds.append(seconds)
        self._show(run, _result(entry), f"{seconds:.0f} s")

    def failed(self, run: Run, done: Done) -> None:
        """A run has ended with an error."""
        self._seconds.append(done.seconds)
        self._show(run, "error", f"status {done.status}, {done.job.log}")

    def end(self) -> None:
        """No run follows: the whole table."""
        if not self._terminal or not self._todo:
            self.say(self.table())

    def _show(self, run: Run, cell: str, more: str) -> None:
        self._cells[run.row.name, run.seed] = cell
        if self._terminal:
            self._draw()
        else:
            self.say(f"  {run.name}: {cell} ({more}); {self._left()}")

    def _left(self) -> str:
        count = self._todo - len(self._seconds)
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        if not count or not mean:
            return f"{count} runs left"
        return f"{count} runs, about {max(1, round(count * mean / self._places / 60))} min left"

    def _draw(self) -> None:
        text = f"{self.table()}\n{self._left()}"
        back = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        print(f"{back}{text}", file=self._stream, flush=True)
        self._drawn = text.count("\n") + 1

    def table(self) -> str:
        """Rows and seeds: the score of each, or its held-out loss; '.' where there is none yet."""
        names = [row.name for row in self._suite.rows]
        width = max(map(len, names)) + 2
        heads = "".join(f"{f'seed {seed}':>11}" for seed in self._seeds)
        lines = [" " * width + heads]
        for name in names:
            cells = (self._cells.get((name, seed), ".") for seed in self._seeds)
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
        return "\n".join(lines)


def _result(entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return "diverged"
    name = "score" if entry["score"] is not None else "validation_loss"
    return f"{entry[name]:.3f}" if entry[name] is not None else "done"
