"""docs/study.md, from the entries of results.jsonl and nothing else: the same file every time.

study.md               the text
study/*.png            its pictures
study/results.jsonl    what it is made of
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from etils import epath

from t2i_jax.study import claims, controls, figures, results
from t2i_jax.study.findings import Findings
from t2i_jax.study.readings import CLEAR, LIKELY, OPEN, Difference, Reading

SHEET = "samples.png"
_MARK = {CLEAR: "**", LIKELY: "*"}
_CAPTIONS = {
    "scores.png": "Scores after the last step, and differences to the first row.",
    "progress.png": "Scores on the way, means over the seeds.",
    "categories.png": "Scores by category, means over the seeds.",
    "losses.png": "Loss on held-out pictures, means over the seeds and over the noise levels.",
    "speed.png": "Quality against the time of drawing, the text's memory made once.",
    "conditioning.png": "What timestep conditioning costs in parameters.",
}


def write(entries: Sequence[dict[str, Any]], out: epath.PathLike) -> None:
    """Writes the report to the .md file `out`, its pictures and data to the folder beside it.

    Raises ValueError where the entries are not those of a suite whose first row has a run.
    """
    out = epath.Path(out)
    findings = Findings(entries)
    folder = out.parent / out.stem
    pictures = figures.write(findings, folder)
    results.write(folder / results.NAME, entries)
    sheet = [SHEET] if (folder / SHEET).exists() else []
    out.write_text(markdown(findings, out.stem, pictures + sheet))


def markdown(findings: Findings, folder: str, pictures: Sequence[str]) -> str:
    """The text; `pictures` are in `folder`."""
    parts = [
        _head(findings, folder),
        _short(findings),
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
        f"{s['optimizer']}, one evaluation ({s['images']} pictures a run, "
        f"{s['sampling']}). Every row differs from the first one, `{f.first}`, in what its name "
        f"says. All numbers are from [results.jsonl]({folder}/{results.NAME}).",
    ]
    if m.get("runs") and m.get("commit"):
        days = " to ".join(dict.fromkeys((m["date"][0], m["date"][-1])))
        made = "; ".join(
            f"{key} {' and '.join(m[key])}" for key in ("t2i_jax", "commit", "jax", "python")
        )
        lines += [
            "",
            f"Made on {' and '.join(m['cpu'])}, {days}, a training on one "
            f"{' or '.join(m['device'])}: {m['seconds'] / m['runs'] / 60:.1f} minutes each, "
            f"{m['seconds'] / 3600:.1f} hours of one for all of them ({made}).",
        ]
    for row, by_seed in f.failed.items():
        for seed, entry in by_seed.items():
            lines += ["", f"`{row}`, seed {seed}, diverged: {entry['failed']}"]
    return lines


def _short(f: Findings) -> list[str]:
    """Which rows differ from the first one, and how many claims held."""
    if not f.scored or len(f.rows) < 2:
        return []
    groups: dict[tuple[bool, str], list[str]] = {}
    for row, found in f.against_first(f.scores).items():
        if row not in f.controls:
            above = found.value > 0 if found.sign != OPEN else False
            groups.setdefault((above, found.sign), []).append(f"`{row}`")
    lines = ["## In short", ""]
    for (above, sign), words in {
        (True, CLEAR): "clearly better than",
        (True, LIKELY): "likely better than",
        (False, OPEN): "not separated from",
        (False, LIKELY): "likely worse than",
        (False, CLEAR): "clearly worse than",
    }.items():
        if rows := groups.get((above, sign)):
            lines.append(f"- {words} `{f.first}`, by score: {', '.join(rows)}")
    words = [verdict.word for verdict in claims.judge(f)]
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    if counts:
        told = ", ".join(f"{word}: {count}" for word, count in counts.items())
        lines.append(f"- {len(words)} claims; {told}")
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
            "*italics*: beyond the interval of that comparison alone, as one in twenty is where "
            "there is no difference. Everything else: these seeds do not separate the two.",
            "",
            "At equal FLOPs both rows are read after the FLOPs of the one that took fewer, the "
            "language model's reading included, between the steps at which a score was taken.",
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
        f"{c['steps']:,} steps, {c['data']}. *Clearly*: all claims of that measure at once; "
        "*likely*: the claim alone. A claim of 'no worse' agrees only where a loss of "
        f"{claims.MARGIN['score']:g} in score, or 5% in time, can be ruled out.",
        "",
        _line(["claim", "made by", "seen here", "verdict"]),
        _line(["---"] * 4),
    ]
    for claim, seen, word, certain in verdicts:
        verdict = f"{certain} {word}".strip()
        if "note" in claim:
            verdict += f"; {claim['note']}"
        lines.append(_line([claim["claim"], claim["where"], _seen(claim, seen), verdict]))
    return lines


def _seen(claim: Mapping[str, Any], seen: claims.Seen | None) -> str:
    if "why" in claim:
        return claim["why"]
    one, other = claim["rows"]
    if seen is None:
        return f"`{one}`, `{other}`: too few runs, or none, of one of them"
    low, high = seen.interval
    if claim["measure"] == "score":
        return f"`{one}` - `{other}`: {seen.value:+.3f} ({low:+.3f} to {high:+.3f})"
    ratio, low, high = (math.exp(x) for x in (seen.value, low, high))
    return f"`{one}` / `{other}`: {ratio:.3f} x ({low:.3f} to {high:.3f})"


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
    device, rounds = any_entry["device"], any_entry["rounds"]
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
        f"Geometric mean over the noise levels, on {f.suite['validation_images']} held-out "
        f"pictures, as a multiple of that of `{f.first}`. It tells how well noise is removed, and "
        "hardly whether the text is heard: most noise levels show what is in the picture. Rows "
        "trained with the captions of others have such captions here, too.",
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
        "designs: what is learnt soonest, not what is best in the end. A design that needs another "
        "rate is put at a disadvantage.",
        f"- {seeds} seed{'s' * (seeds > 1)}: 'not separated' is the likeliest outcome for small "
        "effects, and is no evidence that two designs are alike.",
        "- One spread is assumed for all rows that are above chance; near 0 and 1 scores vary less "
        "than that.",
    ]
    if any(key.startswith(("pretrain.", "clip.")) for diff in f.diffs.values() for key in diff):
        lines.append(
            "- Of every language model and of CLIP there is one instance, which all seeds share: "
            "intervals do not cover how it would have come out with another seed. What it cost to "
            "train is in no reading."
        )
    if f.scored:
        lines.append(
            "- The score reads whether a picture shows what was asked for. How good it looks "
            "beyond that, nobody has measured here."
        )
    return lines


def _again(f: Findings, folder: str) -> list[str]:
    return [
        "## Again",
        "",
        "```sh",
        f"{f.suite['command']}   # all of it, resumable",
        "# this page, in the folder that it is in:",
        f"python launch/study.py --results={folder}/{results.NAME} --out={folder}.md",
        "```",
    ]


# --- words for numbers ---


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(reading: Reading, digits: int) -> str:
    if reading.half is None:
        return f"{reading.value:.{digits}f}"
    return f"{reading.value:.{digits}f} ± {reading.half:.{digits}f}"


def _delta(found: Difference) -> str:
    if found.half is None:
        return f"{found.value:+.3f}"
    mark = _MARK.get(found.sign, "")
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
