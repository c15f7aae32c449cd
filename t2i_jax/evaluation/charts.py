"""Where the parts of a chart go: report.html draws them as inline SVG, in the page's colours.

A chart is WIDTH units wide, which are pixels of CSS on a phone and at most a third more elsewhere,
so that its letters can be read on both. y grows downwards.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

WIDTH = 420
_NAMES, _VALUES = 132, 52  # beside bars
_ONE, _SEVERAL, _SPACE, _FOOT = 16, 12, 9, 24  # heights of bars, between rows, of the axis
_LETTERS = 18  # of a name beside its bars; the table has all of it
_HEIGHT, _TOP, _RIGHT, _BOTTOM, _LEFT = 210, 10, WIDTH - 16, 184, 46  # of a curve, and its frame


class Estimate(NamedTuple):
    """A measured value with its interval, or None where there is none."""

    value: float
    interval: tuple[float, float] | None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; the value alone where there is none."""
        return self.interval or (self.value, self.value)


def number(value: float) -> str:
    """A value with the digits that a reader compares: fewer behind the point where it is large."""
    size = abs(value)
    if size >= 10:
        return f"{value:.1f}" if size >= 100 else f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.01 or not size else f"{value:.2g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers, evenly apart: the first is <= low, the last >= high."""
    if not high > low:
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    ranges = []
    for step in (power * factor for factor in (25, 20, 10, 5, 2.5, 2, 1)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most or not ranges:
            ranges.append([k * step for k in range(first, last + 1)])
    return ranges[-1]


def bars(
    rows: Sequence[tuple[str, Sequence[Estimate | None]]], whole: float | None
) -> dict[str, Any]:
    """A row for each name, a bar for each checkpoint, from 0 to `whole` or as far as they reach."""
    shown = [estimate for _, estimates in rows for estimate in estimates if estimate]
    ends = [end for estimate in shown for end in (*estimate.ends, estimate.value)]
    marks = ticks(min(0.0, *ends), max(whole or 0.0, *ends), most=4)
    scale = (WIDTH - _NAMES - _VALUES) / (marks[-1] - marks[0])

    def x(value):
        return round(_NAMES + (value - marks[0]) * scale, 1)

    drawn, y = [], 4
    for name, estimates in rows:
        height = _ONE if len(estimates) == 1 else _SEVERAL
        row = {"name": name, "x": _NAMES - 8, "y": y + (len(estimates) * height - 2) / 2}
        if len(name) > _LETTERS:
            row["name"] = name[: _LETTERS - 1] + "…"
        row["bars"] = [
            {
                "x": x(min(0.0, estimate.value)),
                "y": y + k * height,
                "width": round(abs(estimate.value) * scale, 1),
                "height": height - 2,
                "whisker": [x(end) for end in estimate.interval or ()],
                "after": x(max(0.0, estimate.value, *estimate.ends)) + 6,
                "text": number(estimate.value),
                "opacity": round(0.3 + 0.7 * (k + 1) / len(estimates), 2),
            }
            for k, estimate in enumerate(estimates)
            if estimate
        ]
        drawn.append(row)
        y += len(estimates) * height + _SPACE
    axis = [{"x": x(mark), "text": f"{mark:.6g}"} for mark in marks]
    return {"width": WIDTH, "height": y + _FOOT, "bottom": y, "rows": drawn, "axis": axis}


def curve(
    lines: Sequence[Sequence[tuple[int, Estimate]]], marks: Sequence[float]
) -> dict[str, Any]:
    """Lines of (step, estimate) with their intervals as bands, from the first to the last mark."""
    steps = [step for line in lines for step, _ in line]
    across = ticks(min(steps), max(steps), most=max(2, min(4, max(steps) - min(steps))))

    def x(step):
        share = (step - across[0]) / (across[-1] - across[0])
        return round(_LEFT + share * (_RIGHT - _LEFT), 1)

    def y(value):
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)

    def path(points):
        return "M" + " L".join(f"{a:g} {b:g}" for a, b in points)

    drawn = []
    for line in lines:
        dots = [(x(step), y(estimate.value)) for step, estimate in line]
        lower, upper = ([(x(step), y(e.ends[end])) for step, e in line] for end in (0, 1))
        drawn.append({"line": path(dots), "band": path(upper + lower[::-1]) + "Z", "dots": dots})
    return {
        "width": WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "lines": drawn,
        "across": [{"x": x(step), "text": _short(step)} for step in across],
        "up": [{"y": y(mark), "text": f"{mark:.6g}"} for mark in marks],
    }


def _short(step: float) -> str:
    """A number of steps."""
    if step >= 1e6:
        return f"{step / 1e6:.6g}M"
    return f"{step / 1e3:.6g}k" if step >= 1e4 else f"{step:.6g}"
