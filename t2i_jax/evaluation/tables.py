"""The numbers of reports beside each other: as a table, as bars, and as curves against the step.

Reports are those of report.py, all of one score; `labels` tell their checkpoints apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import math
from typing import Any, NamedTuple

from t2i_jax.evaluation import charts
from t2i_jax.evaluation.charts import Estimate

Report = Mapping[str, Any]

_WHOLE = {"accuracy": 1.0, "DPG score": 100.0}  # the most that a score can be
_ABREAST = 4  # more checkpoints than this are rows of the table, not columns
_NOTES = {"control": "control", "metric": "further metric"}


class Row(NamedTuple):
    """What was measured, of each report: its estimate, and what else its entry says."""

    kind: str  # overall, category, control or metric
    name: str
    estimates: list[Estimate | None]
    entries: list[Mapping[str, Any]]


def estimate(entry: Mapping[str, Any], key: str) -> Estimate | None:
    """entry[key] with its interval; None where it is absent, or no finite number."""
    value, interval = entry.get(key), entry.get("interval")
    if value is None or not math.isfinite(value):
        return None
    known = interval is not None and all(map(math.isfinite, interval))
    return Estimate(float(value), (float(interval[0]), float(interval[1])) if known else None)


def between(measured: Estimate | None) -> str:
    """An interval in words."""
    return " to ".join(map(charts.number, measured.interval or ())) if measured else ""


def best(better: str, estimates: Iterable[Estimate | None]) -> Estimate:
    """The 'higher' or 'lower' of those that are there."""
    chosen = max if better == "higher" else min
    return chosen((e for e in estimates if e), key=lambda e: e.value)


def rows(reports: Sequence[Report]) -> Iterator[Row]:
    """The score, the categories, the controls and the further metrics that any report has."""
    whole = [{"n": report["num_images"], **report} for report in reports]
    yield Row("overall", "overall", [estimate(r, "score") for r in reports], whole)
    parts = [("category", "categories", "fraction"), ("control", "controls", "")]
    for kind, key, value in [*parts, ("metric", "metrics", "value")]:
        held = [report.get(key) or {} for report in reports]
        for name in dict.fromkeys(name for part in held for name in part):
            entries = [part.get(name, {}) for part in held]
            if kind == "control":  # a bare number
                entries = [{"": part[name]} if name in part else {} for part in held]
            yield Row(kind, name, [estimate(entry, value) for entry in entries], entries)


def table(reports: Sequence[Report], labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Rows of cells: checkpoints across, or down if they are many; the first of each is a head."""
    single = len(reports) == 1
    heads = [reports[0]["metric"], "95% interval"] if single else labels
    lines = [[_cell(text, "head") for text in ("", *heads, "images")]]
    for row in rows(reports):
        better = reports[0]["better"] if row.kind in ("overall", "category") else None
        ranked = better is not None and sum(e is not None for e in row.estimates) > 1
        top = best(better, row.estimates).value if ranked else None
        line = [_cell(row.name, f"{row.kind} head", _NOTES.get(row.kind, ""))]
        for e in row.estimates:
            text, small = charts.number(e.value) if e else "–", "" if single else between(e)
            line.append(_cell(text, row.kind, small, e is not None and e.value == top))
        if single:
            line.append(_cell(between(row.estimates[0]), row.kind))
        line.append(_cell(_count(row.entries), row.kind))
        lines.append(line)
    return lines if len(reports) <= _ABREAST else [list(line) for line in zip(*lines, strict=True)]


def _cell(text: str, kind: str, small: str = "", is_best: bool = False) -> dict[str, Any]:
    return {"text": text, "kind": kind, "small": small, "best": is_best}


def _count(entries: Sequence[Mapping[str, Any]]) -> str:
    """Of how many images an estimate is, and how many of these passed if it is one report's."""
    counts = ", ".join(dict.fromkeys(f"{entry['n']:,}" for entry in entries if "n" in entry))
    if len(entries) == 1 and "passed" in entries[0]:
        return f"{entries[0]['passed']:,} of {counts}"
    return counts


def bars(reports: Sequence[Report], labels: Sequence[str]) -> dict[str, Any] | None:
    """Bars by category and control: of all checkpoints, or of the last if they are many.

    None where there is nothing to compare.
    """
    if len(reports) > _ABREAST:
        reports, labels = reports[-1:], labels[-1:]
    shown = [row for row in rows(reports) if row.kind != "metric" and any(row.estimates)]
    if len(shown) < 2:
        return None
    drawn = charts.bars([row[1:3] for row in shown], _WHOLE.get(reports[0]["metric"]))
    return {**drawn, "labels": labels}


def curves(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The score, the categories and the further metrics against the step, a line for each weights.

    None unless all have a step, and the step tells reports of the same kind of weights apart.
    """
    keys = [(report["weights"], report.get("checkpoint_step")) for report in reports]
    steps = {step for _, step in keys}
    if None in steps or len(steps) < 2 or len(set(keys)) < len(keys):
        return []
    panels = []
    for row in rows(reports):
        lines: dict[str, list[tuple[int, Estimate]]] = {}
        for (weights, step), measured in zip(keys, row.estimates, strict=True):
            if measured:
                lines.setdefault(weights, []).append((step, measured))
        if lines and row.kind != "control":
            ends = [end for line in lines.values() for _, e in line for end in (e.value, *e.ends)]
            panels.append((row, lines, ends))
    reach = [end for row, _, ends in panels if row.kind != "metric" for end in ends]
    whole = _WHOLE.get(reports[0]["metric"], 0.0)
    common = charts.ticks(min([0.0, *reach]), max([whole, *reach]), most=4)
    drawn = []
    for row, lines, ends in panels:
        marks = charts.ticks(min(ends), max(ends), most=4) if row.kind == "metric" else common
        name = reports[0]["metric"] if row.kind == "overall" else row.name
        curve = charts.curve(list(lines.values()), marks)
        drawn.append({**curve, "name": name, "kind": row.kind, "weights": list(lines)})
    return drawn
