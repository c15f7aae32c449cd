"""The pictures of a study's report, from its findings."""

from collections.abc import Callable, Mapping, Sequence
import io

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from t2i_jax.study.findings import Findings

# Of one hue for what is compared with, the others to be told apart by colour-blind readers, too.
_FIRST, _INK, _PALE = "#222222", "#1f5fa8", "#b9c3cf"
_COLORS = ("#1f5fa8", "#d1603d", "#3d8b57", "#8a5aa8", "#b8860b")
_DPI = 130


def write(findings: Findings, folder: epath.Path) -> list[str]:
    """Writes what there are findings for; returns the names of the files, in the report's order."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (possible, draw) in FIGURES.items():
        if possible(findings):
            (folder / name).write_bytes(png(draw(findings)))
            written.append(name)
    return written


def png(figure: Figure) -> bytes:
    """A figure as a file."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _figure(width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def scores(findings: Findings) -> Figure:
    """Score of every row, each seed as a dot; and what it has more or less than the first row."""
    size = (9.4, 0.27 * len(findings.rows) + 1.1)
    figure, axes = _figure(*size, ncols=2, sharey=True, width_ratios=(3, 2))
    left, right = axes[0]
    found, against = findings.means(findings.scores), findings.against_first(findings.scores)
    equal, ink = findings.at_equal_flops(), {"fmt": "o", "ms": 4.5, "lw": 1.3, "capsize": 2}
    left.axvline(found[findings.first].value, color=_PALE, lw=1, zorder=0)
    right.axvline(0, color=_PALE, lw=1, zorder=0)
    for y, row in enumerate(findings.rows):
        color = _FIRST if row == findings.first else _INK
        seeds = list(findings.scores[row].values())
        left.plot(seeds, [y] * len(seeds), "o", color=_PALE, ms=4, zorder=1)
        left.errorbar(found[row].value, y, xerr=found[row].half, color=color, **ink)
        if row in against:
            right.errorbar(against[row].value, y, xerr=against[row].half, color=_INK, **ink)
        if row in equal and findings.flops(row) != findings.flops(findings.first):
            right.plot(equal[row].value, y, "D", mfc="white", mec=_COLORS[1], ms=5)
    right.plot([], [], "o", color=_INK, ms=4.5, label="after equal steps, 95%")
    right.plot([], [], "D", mfc="white", mec=_COLORS[1], ms=5, label="after equal FLOPs")
    left.set_yticks(range(len(findings.rows)), findings.rows)
    left.invert_yaxis()
    left.set_xlim(left=-0.02)
    left.set_xlabel("score: mean over the seeds, 95%; pale: each seed", fontsize=8)
    right.set_xlabel(f"minus that of {findings.first}", fontsize=8)
    right.legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def categories(findings: Findings) -> Figure:
    """Score of every row in every category, as a map."""
    found = findings.categories()
    table = np.array([[found[name][row].value for name in found] for row in findings.rows])
    figure, axes = _figure(7.2, 0.27 * len(findings.rows) + 0.9)
    axis: Axes = axes[0, 0]
    axis.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        color = "white" if value > 0.6 else "#222222"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_yticks(range(len(findings.rows)), findings.rows)
    axis.set_xticks(range(len(found)), [name.replace("_", "\n") for name in found])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def losses(findings: Findings) -> Figure:
    """Held-out loss by step, a panel for each group of rows."""
    return _curves(findings, "validation_loss", "held-out loss", log=True)


def progress(findings: Findings) -> Figure:
    """Score by step, a panel for each group of rows."""
    return _curves(findings, "score", "score", log=False)


def _curves(findings: Findings, name: str, label: str, *, log: bool) -> Figure:
    groups = _groups(findings)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = _figure(3.0 * columns, 2.5 * lines, nrows=lines, ncols=columns, sharey=True)
    for axis, (heading, rows) in zip(axes.flat, groups.items(), strict=False):
        colors = iter(_COLORS * len(rows))
        for row in rows:
            color = _FIRST if row == findings.first else next(colors)
            steps, values = zip(*findings.curve(row, name), strict=True)
            axis.plot(steps, values, color=color, lw=1.5, label=row)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:.2g}")
            axis.yaxis.set_minor_formatter("{x:.2g}")
            axis.tick_params(which="minor", labelsize=6)
        axis.set_title(heading, fontsize=8, loc="left")
        axis.legend(fontsize=6.5, frameon=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(label, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    return figure


def _groups(findings: Findings) -> dict[str, list[str]]:
    known = {
        heading: [row for row in rows if row in findings.rows]
        for heading, rows in findings.suite.get("groups", {}).items()
    }
    known = {heading: rows for heading, rows in known.items() if rows}
    return known or {"": findings.rows}


def speed(findings: Findings) -> Figure:
    """Score against the time of drawing, as a multiple of the first row's."""
    figure, axes = _figure(7.2, 4.2)
    axis: Axes = axes[0, 0]
    found, points = findings.means(findings.scores), {}
    for row in findings.rows:
        if row not in findings.speeds or row in findings.floor:
            continue
        x, y = findings.speeds[row]["sample"]["ratio"], found[row]
        color = _FIRST if row == findings.first else _INK
        axis.errorbar(x, y.value, yerr=y.half, fmt="o", color=color, ms=4, lw=0.6, alpha=0.7)
        points[row] = (x, y.value)
    _label(axis, points)
    axis.set_xlabel(f"seconds of a batch of pictures / those of {findings.first}", fontsize=8)
    axis.set_ylabel("score, 95%", fontsize=8)
    return figure


def _label(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, at the nearest of some places where they meet no name before."""
    width, height = 4.0, 9.0  # of a letter and of a line, in points
    taken: list[tuple[float, float, float]] = []  # left, right, line
    scale = 72 / axis.figure.dpi
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        at_x, at_y = axis.transData.transform(point) * scale
        free = None
        for dy in (3, -9, 14, -20, 25, -31):
            for side in (1, -1):
                left = at_x + 5 if side == 1 else at_x - 5 - width * len(name)
                box = (left, left + width * len(name), at_y + dy)
                hit = any(
                    box[0] < b[1] and b[0] < box[1] and abs(box[2] - b[2]) < height for b in taken
                )
                if free is None and not hit:
                    free = (box, dy, side)
        box, dy, side = free or ((at_x, at_x, at_y), 3, 1)
        taken.append(box)
        how = {"textcoords": "offset points", "fontsize": 7, "ha": "left" if side == 1 else "right"}
        line = {"arrowstyle": "-", "lw": 0.5, "color": "#888888", "shrinkA": 0, "shrinkB": 2}
        axis.annotate(name, point, (5 * side, dy), arrowprops=line, **how)


def conditioning(findings: Findings) -> Figure:
    """Parameters that tell the DiT the time, of all that are trained."""
    rows = _with_conditioning(findings)
    figure, axes = _figure(7.2, 0.32 * len(rows) + 0.8)
    axis: Axes = axes[0, 0]
    for y, row in enumerate(rows):
        fact = findings.facts[row]
        told, whole = fact["conditioning"] / 1e6, fact["parameters"] / 1e6
        axis.barh(y, whole - told, color=_PALE, height=0.62)
        axis.barh(y, told, left=whole - told, color=_COLORS[1], height=0.62)
        axis.text(whole, y, f"  {told / whole:.0%}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("trained parameters, millions; in colour: for the conditioning", fontsize=8)
    return figure


def _with_conditioning(findings: Findings) -> list[str]:
    """The rows of another conditioning, and the first one."""
    changed = [r for r in findings.rows if "dit.conditioning" in findings.diffs[r]]
    return [findings.first, *changed] if changed else []


Test = Callable[[Findings], bool]
FIGURES: dict[str, tuple[Test, Callable[[Findings], Figure]]] = {
    "scores.png": (lambda f: f.scored, scores),
    "progress.png": (lambda f: f.scored, progress),
    "categories.png": (lambda f: f.scored and bool(f.categories()), categories),
    "losses.png": (lambda f: f.validated, losses),
    "speed.png": (lambda f: f.scored and bool(f.speeds), speed),
    "conditioning.png": (lambda f: bool(_with_conditioning(f)), conditioning),
}


def sheet(strips: Sequence[tuple[str, np.ndarray]], prompts: Sequence[str]) -> Figure:
    """Pictures of several rows, the same prompts and noise: a line each.

    `strips` are (row, uint8 (n, H, W, 3)).
    """
    count = len(prompts)
    figure, axes = _figure(9.0, 0.95 * len(strips) + 0.7, nrows=len(strips), ncols=count)
    for line, (row, images) in zip(axes, strips, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=8)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title("\n".join(_wrapped(prompt)), fontsize=6)
    return figure


def _wrapped(prompt: str, width: int = 17) -> list[str]:
    lines = [""]
    for word in prompt.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
