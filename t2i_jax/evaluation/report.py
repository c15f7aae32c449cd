"""A page of evaluation reports: one HTML file that needs nothing else, and runs nothing.

A report is a dict for JSON, of one checkpoint. A page has reports of one benchmark and score:

    benchmark, metric, better    of what, and the name of its score; 'higher' or 'lower'
    score, interval              None where it has not been scored; then `todo` says what to do
    checkpoint, checkpoint_step, weights ('ema' or 'params'), num_images, seed, sampling
    categories                   name -> fraction (in the score's unit), n, interval, maybe passed
    controls                     name -> value in the score's unit
    metrics                      name -> value, interval, n: further ones
    pipeline                     how images were resized, quantised, stored

The last four may be absent. Names and prompts are anyone's text: the template escapes all of it.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import io
from pathlib import Path
from typing import Any, NamedTuple
import unicodedata

from etils import epath
import jinja2
import numpy as np

import t2i_jax
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation import charts, pictures, tables
from t2i_jax.evaluation.tables import Report

_TITLES = {
    "scenes": "Scenes",
    "digits": "Digits",
    "geneval": "GenEval",
    "dpg": "DPG-Bench",
    "mjhq": "MJHQ-30K",
    "coco": "COCO captions",
}
_WEIGHTS = {"ema": "averaged (EMA)", "params": "as trained (no EMA)"}
_IMAGES = 108  # of a page: what keeps it at a few MB
_SHEET, _STRIPS = 16, 4  # of a category and checkpoint: if there is one checkpoint, if several
_CHECKPOINTS = 6  # with samples
_CELL, _LARGE, _REDUCED = 160, 256, 192  # pixels: enlarged up to; reduced to, if one, if several
_GAP = 8  # pixels between the images of a prompt
_LETTERS = 400  # of a prompt


class Sample(NamedTuple):
    """A uint8 image (H, W, 3), its prompt, and whether it passed: None where nothing judged it."""

    image: np.ndarray
    caption: str
    passed: bool | None = None


Samples = Mapping[str, Sequence[Sample]]  # category, or 'all' -> samples, in the order drawn


def write(path: epath.PathLike, reports: Sequence[Report], samples: Sequence[Samples] = ()) -> None:
    """Writes the page of `html`, making its folder. Raises ConfigError where it cannot."""
    page = html(reports, samples)
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"A report cannot be written to {path}: {error}.") from error


def html(reports: Sequence[Report], samples: Sequence[Samples] = ()) -> str:
    """The page of reports, by step where all have one, with samples of each.

    The same reports and samples give the same text. Of many samples the first are shown, never the
    best. Raises ValueError for reports of several scores or none, or samples of other reports.
    """
    kinds = {(report["benchmark"], report["metric"], report["better"]) for report in reports}
    if len(kinds) != 1:
        raise ValueError(f"A page has reports of one benchmark and score, got {sorted(kinds)}.")
    if len(samples) not in (0, len(reports)):
        raise ValueError(f"{len(reports)} reports, but samples of {len(samples)}.")
    order = list(range(len(reports)))
    if all(report.get("checkpoint_step") is not None for report in reports):
        order.sort(key=lambda i: reports[i]["checkpoint_step"])
    reports, samples = ([s[i] for i in order] if s else [] for s in (reports, samples))
    labels = _labels(reports)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _clean(value) if type(value) is str else value,
    )
    return environment.get_template("report.html").render(
        title=_TITLES.get(reports[0]["benchmark"], reports[0]["benchmark"]),
        metric=reports[0]["metric"],
        better=reports[0]["better"],
        labels=labels,
        heroes=_heroes(reports, labels),
        settings=_settings(reports, labels),
        pipeline=_told(reports, labels, lambda report: report.get("pipeline")),
        todo=_told(reports, labels, lambda report: report.get("todo")),
        table=tables.table(reports, labels),
        bars=tables.bars(reports, labels),
        curves=tables.curves(reports),
        sheets=_sheets(reports, labels, samples) if samples else [],
        version=t2i_jax.__version__,
    )


def _clean(text: str) -> str:
    """Without what no HTML can hold: control characters, halves of surrogate pairs."""
    bad = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cs")} - {"\n", "\t"}
    return text.translate({ord(c): "\N{REPLACEMENT CHARACTER}" for c in bad})


def _labels(reports: Sequence[Report]) -> list[str]:
    """What tells the checkpoints apart: the step, or else more."""

    def label(number, report, parts):
        step = report.get("checkpoint_step")
        where = str(report["checkpoint"])
        steps = where if step is None else f"step {step:,}"
        return ", ".join([steps, report["weights"], where, f"report {number}"][:parts])

    for parts in (1, 2, 3, 4):
        labels = [label(i, report, parts) for i, report in enumerate(reports, 1)]
        if len(set(labels)) == len(labels):
            break
    return labels


def _heroes(reports: Sequence[Report], labels: Sequence[str]) -> list[dict[str, str]]:
    """The score of the last checkpoint that has one, and of the best, where that is another."""
    scored = {
        label: measured
        for label, report in zip(labels, reports, strict=True)
        if (measured := tables.estimate(report, "score"))
    }
    if not scored:
        return []
    last, top = list(scored)[-1], tables.best(reports[0]["better"], scored.values())
    shown = {last: f"{last}, the last" if len(reports) > 1 else ""}
    if top.value != scored[last].value:
        first = next(label for label, measured in scored.items() if measured == top)
        shown[first] = f"{first}, the best of {len(scored)}"
    return [
        {
            "score": charts.number(scored[label].value),
            "interval": tables.between(scored[label]),
            "whose": whose,
        }
        for label, whose in shown.items()
    ]


def _settings(reports: Sequence[Report], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Names and values of how images were made; several values where the reports differ."""

    def size(report):
        return f"{report['sampling']['width']} × {report['sampling']['height']} pixels"

    def sampling(name):
        return lambda report: report["sampling"].get(name)

    told_apart = ("height", "width", "checkpoint_step")
    names = dict.fromkeys(name for report in reports for name in report["sampling"])
    entries: dict[str, Callable[[Report], Any]] = {
        "images": lambda report: f"{report['num_images']:,}",
        "seed": lambda report: report["seed"],
        "size": size,
        **{n.replace("_", " "): sampling(n) for n in names if n not in told_apart},
        "weights": lambda report: _WEIGHTS.get(report["weights"], report["weights"]),
        "checkpoint": lambda report: report["checkpoint"],
    }
    if len(reports) == 1:
        entries["step"] = lambda report: report.get("checkpoint_step")
    told = {name: _told(reports, labels, get) for name, get in entries.items()}
    return [{"name": name, "told": parts} for name, parts in told.items() if parts]


def _told(
    reports: Sequence[Report], labels: Sequence[str], get: Callable[[Report], Any]
) -> list[dict[str, str]]:
    """What the reports say, each thing once, and which of them say it where not all do."""
    whose: dict[str, list[str]] = {}
    for report, label in zip(reports, labels, strict=True):
        whose.setdefault(_text(get(report)), []).append(label)
    alike = len(whose) == 1
    return [{"text": t, "whose": "" if alike else "; ".join(of)} for t, of in whose.items() if t]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_text(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _sheets(
    reports: Sequence[Report], labels: Sequence[str], samples: Sequence[Samples]
) -> list[dict[str, Any]]:
    """A sheet for each category: its first prompts, with the images of the checkpoints abreast."""
    few = min(len(reports), _CHECKPOINTS)  # spread evenly, with the first and the last
    chosen = [round(k * (len(reports) - 1) / max(1, few - 1)) for k in range(few)]
    known = [name for report in reports for name in report.get("categories") or {}]
    held = [name for i in chosen for name, part in samples[i].items() if part]
    names = [name for name in dict.fromkeys(known + held) if name in held]
    most = _SHEET if few == 1 else _STRIPS
    limit = max(1, min(most, _IMAGES // (few * max(1, len(names)))))
    sheets = []
    for name in names:
        prompts: dict[str, list[dict[str, Any]]] = {}
        counts, shown = [], []
        for i in chosen:
            part = samples[i].get(name, ())
            entry = (reports[i].get("categories") or {}).get(name, {})
            every = reports[i]["num_images"] if name == "all" else entry.get("n", 0)
            counts.append(max(len(part), every))
            shown += part[:limit]
            for sample in part[:limit]:
                tile = _tile(sample, labels[i] if few > 1 else "", _LARGE if few == 1 else _REDUCED)
                prompts.setdefault(sample.caption, []).append(tile)
        sheets.append(
            {
                "name": "" if name == "all" else name,
                "told": _how_many(shown, counts, few, len(reports)),
                "prompts": [
                    {
                        "caption": _cut(caption),
                        "tiles": tiles,
                        "width": sum(tile["width"] + _GAP for tile in tiles) - _GAP,
                    }
                    for caption, tiles in prompts.items()
                ],
            }
        )
    return sheets


def _how_many(shown: Sequence[Sample], counts: Sequence[int], few: int, reports: int) -> str:
    """Of how many images those shown are, and how many of them passed."""
    verdicts = [sample.passed for sample in shown if sample.passed is not None]
    every = f"{sum(counts):,}"
    told = f"All {every} images" if len(shown) == sum(counts) else f"{len(shown)} of {every} images"
    if len(shown) < sum(counts):
        told += ", the first of each checkpoint" if few > 1 else ", the first drawn"
    if few < reports:
        told += f", of {few} of {reports} checkpoints"
    return told + (f"; {sum(verdicts)} of these passed." if verdicts else ".")


def _cut(caption: str) -> str:
    return caption if len(caption) <= _LETTERS else caption[: _LETTERS - 1] + "…"


def _tile(sample: Sample, label: str, largest: int) -> dict[str, Any]:
    """An image within the page: small ones as they are, for the browser to enlarge; others less."""
    image = np.asarray(sample.image)
    factor = _CELL // max(image.shape[:2])
    whole = io.BytesIO()
    if factor > 1:
        picture, kind = pictures.fit(image, max(image.shape[:2])), "png"
        picture.save(whole, "PNG", optimize=True)
    else:
        picture, kind, factor = pictures.fit(image, largest), "jpeg", 1
        picture.save(whole, "JPEG", quality=90)
    verdict = {True: "passed", False: "failed", None: ""}[sample.passed]
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(whole.getvalue()).decode()}",
        "width": picture.width * factor,
        "height": picture.height * factor,
        "enlarged": factor > 1,
        "alt": ", ".join(filter(None, [_cut(sample.caption) or "no prompt", label, verdict])),
        "label": label,
        "verdict": verdict,
    }
