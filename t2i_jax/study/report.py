"""docs/study.md, from the entries of results.jsonl and nothing else: the same file every time.

study.md               the text
study/*.png            its pictures
study/results.jsonl    what it is made of
"""

from collections.abc import Sequence
import math
from typing import Any

from etils import epath

from t2i_jax.study import claims, controls, figures, results
from t2i_jax.study.findings import Findings
from t2i_jax.study.readings import CLEAR, LIKELY, Difference, Reading

SHEET = "samples.png"
_MARK = {CLEAR: "**", LIKELY: "*"}
_CAPTIONS = {
    "scores.png": "Scores after the last step. Diamonds: after as many FLOPs as the first row.",
    "progress.png": "Scores on the way, means over the seeds.",
    "categories.png": "Scores by category, means over the seeds.",
    "losses.png": "Loss on held-out pictures by the averaged weights, means over the seeds.",
    "speed.png": "Quality against the time of drawing, the text's memory made once.",
    "conditioning.png": "What timestep conditioning costs in parameters.",
}


def write(entries: Sequence[dict[str, Any]], out: epath.PathLike) -> None:
    """Writes the report to the .md file `out`, its pictures and data to the folder beside it.

    Raises ValueError where the entries are not those of a suite with a finished run.
    """
    out = epath.Path(out)
    findings = Findings(entries)
    if not findings.rows:
        raise ValueError("No run of the suite has ended: there is nothing to report.")
    folder = out.parent / out.stem
    pictures = figures.write(findings, folder)
    results.write(folder / results.NAME, entries)
    sheet = [SHEET] if (folder / SHEET).exists() else []
    out.write_text(markdown(findings, out.stem, pictures + sheet))


def markdown(findings: Findings, folder: str, pictures: Sequence[str]) -> str:
    """The text; `pictures` are in `folder`."""
    parts = [
        _head(findings, folder),
        _controls(findings),
        _table(findings),
        _claims(findings),
        _pictures(folder, pictures),
        _speeds(findings),
        _losses(findings),
        _limits(findings),
        _again(findings, folder),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _head(f: Findings, folder: str) -> list[str]:
    s, m = f.suite, f.machine
    runs = sum(map(len, f.runs.values()))
    seeds = len(s["seeds"])
    lines = [
        f"# The study: {s['name']}",
        "",
        "<!-- Written by launch/study.py from results.jsonl; edits are lost. -->",
        "",
        f"{len(f.rows)} designs, {seeds} seed{'s' * (seeds > 1)} each, {runs} trainings under one "
        f"budget: {s['steps']:,} steps of {s['batch_size']} pictures ({s['data']}), "
        f"{s['optimizer']}, one language model, one evaluation ({s['images']} pictures a run, "
        f"{s['sampling']}). Every row differs from the first one, `{f.first}`, in what its name "
        f"says. All numbers are from [results.jsonl]({folder}/{results.NAME}).",
    ]
    if m:
        each, side = m["seconds"] / runs / 60, m["devices"]
        lines += [
            "",
            f"Made on {m['cpu']}: {side} training{'s' * (side > 1)} at a time, each on one "
            f"{m['device']} and {each:.1f} minutes long, {m['seconds'] / 3600:.1f} hours in all "
            f"({m['date']}; t2i_jax {m['t2i_jax']}, commit `{m['commit']}`, jax {m['jax']}, Python "
            f"{m['python']}).",
        ]
    for row, by_seed in f.failed.items():
        for seed, entry in by_seed.items():
            lines += ["", f"`{row}`, seed {seed}, diverged: {entry['failed']}"]
    return lines


def _controls(f: Findings) -> list[str]:
    found = controls.check(f)
    if not found:
        return []
    lines = ["## Controls", "", "What must come out right before anything else is believed:", ""]
    return lines + [f"- {'' if c.passed else '**FAILED** '}{c.text}" for c in found]


def _table(f: Findings) -> list[str]:
    lines = ["## What was seen", ""]
    columns = ["design", "trained", "FLOPs a step"]
    columns += ["score", "minus first", "at equal FLOPs"] * f.scored
    columns += ["held-out loss"] * f.validated
    lines += [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    means = f.means(f.scores) if f.scored else {}
    against = f.against_first(f.scores) if f.scored else {}
    equal = f.at_equal_flops() if f.scored else {}
    losses = f.means(f.losses) if f.validated else {}
    first = f.flops(f.first)
    for row in f.rows:
        cells = [f"`{row}`", f"{f.facts[row]['parameters'] / 1e6:.2f}M"]
        cells.append(f"{f.flops(row) / 1e9:.2f}G ({f.flops(row) / first:.2f} x)")
        if f.scored:
            cells.append(_mean(means[row], 3))
            cells.append(_delta(against[row]) if row in against else "")
            same = f.flops(row) == first
            cells.append("" if row not in equal else "as left" if same else _delta(equal[row]))
        if f.validated:
            cells.append(f"{math.exp(losses[row].value):.3f}")
        lines.append(_line(cells))
    if f.scored:
        lines += [
            "",
            "Scores are means over the seeds with 95% intervals; differences are paired by seed. "
            "Their intervals share one spread, estimated from all rows together. In **bold**: "
            "beyond what chance does to any of these comparisons at once (Bonferroni, 95%); in "
            "*italics*: beyond the interval of that comparison alone, of which one in twenty is "
            "by chance. Everything else: these seeds do not separate the two. At equal FLOPs both "
            "rows are read after the FLOPs of the one that took fewer, the language model's "
            "reading included, between the steps at which a score was taken.",
        ]
    return lines


def _claims(f: Findings) -> list[str]:
    verdicts = claims.judge(f)
    if not verdicts:
        return []
    c = f.suite
    lines = [
        "## Claims, beside what was seen",
        "",
        f"At this scale: {f.facts[f.first]['parameters'] / 1e6:.1f}M trained parameters, "
        f"{c['steps']:,} steps, {c['data']}. The paper is arXiv 2505.10046; its models are a "
        "thousand times larger. *Clearly*: all claims of that measure at once; *likely*: the "
        "claim alone. A claim of 'no worse' agrees only where a loss of "
        f"{claims.MARGIN['score']:g} in score, or 5% in time, can be ruled out.",
        "",
        _line(["claim", "made by", "seen here", "verdict"]),
        _line(["---"] * 4),
    ]
    for claim, seen, word, certain in verdicts:
        told = claim.get("why", "")
        if seen is not None:
            one, other = claim["rows"]
            told = f"`{one}` / `{other}`, " if claim["measure"] == "sample" else ""
            told = told or f"`{one}` - `{other}`: "
            told += _ratio(seen) if claim["measure"] != "score" else _delta(seen, plain=True)
        verdict = f"{certain} {word}".strip() if certain else word
        if "note" in claim:
            verdict += f"; {claim['note']}"
        lines.append(_line([claim["claim"], claim["where"], told, verdict]))
    return lines


def _pictures(folder: str, names: Sequence[str]) -> list[str]:
    lines = ["## Figures"] if names else []
    for name in names:
        caption = _CAPTIONS.get(name, "The same prompts and the same noise, by every design.")
        lines += ["", f"![{caption}]({folder}/{name})", "", f"*{caption}*"]
    return lines


def _speeds(f: Findings) -> list[str]:
    if not f.speeds:
        return []
    any_entry = next(iter(f.speeds.values()))
    device, rounds = f.machine.get("device", "device"), any_entry["rounds"]
    lines = [
        "## Speed",
        "",
        f"All rows in turns on one {device}, {rounds} rounds, ratios to `{f.first}` by "
        "round with 95% intervals; below 1 is faster. Training: a step of "
        f"{any_entry['batch_size']} pictures. Drawing: {any_entry['images']} pictures with "
        "guidance, the text read once for all steps; last column: how many times as long that "
        "takes when it is read anew at every step.",
        "",
        _line(["design", "training", "drawing", "ms a picture", "text read anew"]),
        _line(["---", *["---:"] * 4]),
    ]
    for row in f.rows:
        if row not in f.speeds:
            continue
        entry = f.speeds[row]
        each = entry["sample"]["median"] / entry["images"] * 1e3
        cells = [f"`{row}`", _times(entry["train"]), _times(entry["sample"])]
        lines.append(_line([*cells, f"{each:.1f}", _times(entry["saved"])]))
    return lines


def _losses(f: Findings) -> list[str]:
    if not f.validated:
        return []
    against = f.against_first(f.losses)
    lines = [
        "## Held-out loss",
        "",
        f"Mean over the noise levels, on {f.suite['validation_images']} held-out pictures, as a "
        f"multiple of that of `{f.first}`: less noisy than scores, and not the same thing; the "
        "levels with little noise, where details are, weigh most.",
        "",
        _line(["design", "times the first row's"]),
        _line(["---", "---:"]),
    ]
    return lines + [_line([f"`{row}`", _ratio(found)]) for row, found in against.items()]


def _limits(f: Findings) -> list[str]:
    seeds = len(f.suite["seeds"])
    lines = [
        "## What this cannot say",
        "",
        f"- It is one small world, {f.suite['steps']:,} steps and one learning rate for all "
        "designs; a design that needs another is put at a disadvantage.",
        f"- {seeds} seed{'s' * (seeds > 1)}: 'not separated' is the likeliest outcome for small "
        "effects, and is no evidence that two designs are alike.",
    ]
    if f.suite["data"] in ("scenes", "digits"):
        lines.append(
            "- The score reads whether a picture shows what was asked for. How good it looks "
            "beyond that, nobody has measured here."
        )
    return lines


def _again(f: Findings, folder: str) -> list[str]:
    name = f.suite["name"]
    return [
        "## Again",
        "",
        "```sh",
        f"python launch/study.py --suite={name} --workdir=runs/{name}   # all of it, resumable",
        f"python launch/study.py --results=docs/{folder}/{results.NAME} --out=docs/{folder}.md",
        "```",
        "",
        "The second line writes this page again. [laboratory.md](laboratory.md) tells how to add "
        "a row, or a suite of your own.",
    ]


# --- words for numbers ---


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(reading: Reading, digits: int) -> str:
    if reading.half is None:
        return f"{reading.value:.{digits}f}"
    return f"{reading.value:.{digits}f} ± {reading.half:.{digits}f}"


def _delta(found: Difference, *, plain: bool = False) -> str:
    if found.half is None:
        return f"{found.value:+.3f}"
    mark = "" if plain else _MARK.get(found.sign, "")
    return f"{mark}{found.value:+.3f}{mark} ± {found.half:.3f}"


def _ratio(found: Difference) -> str:
    """Of a difference of logarithms."""
    text = f"{math.exp(found.value):.3f} x"
    if found.half is None:
        return text
    low, high = (math.exp(found.value + side * found.half) for side in (-1, 1))
    mark = _MARK.get(found.sign, "")
    return f"{mark}{text}{mark} ({low:.3f} to {high:.3f})"


def _times(entry: dict[str, float]) -> str:
    if entry["low"] == entry["high"]:
        return f"{entry['ratio']:.2f}"
    return f"{entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"
