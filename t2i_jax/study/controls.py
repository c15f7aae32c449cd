"""What must come out right, or the laboratory is broken and nothing else counts.

- Pictures against the prompts of other pictures, and pictures of the empty prompt, are right as
  often as by chance: no more often than perfect pictures of other prompts are (`chance`).
- So are pictures of a row that was trained with the captions of others.
- A row whose language model has random weights is not better than one that differs from it in the
  language model's training alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from t2i_jax.evaluation.intervals import wilson
from t2i_jax.study.findings import Findings

_LEVEL = 0.05
_PAIRS = 2000  # of pictures and prompts that chance is measured on


class Control(NamedTuple):
    """Whether a control came out right, and what was seen."""

    passed: bool
    text: str


def chance(image_size: int, seed: int = 0) -> tuple[int, int]:
    """How many of how many perfect pictures of scenes show what another one's prompt asks for."""
    from t2i_jax.data.scenes import Scenes
    from t2i_jax.evaluation import scenes

    world = Scenes(image_size, "heldout", seed=seed, length=_PAIRS)
    order = np.random.default_rng(seed).permutation(_PAIRS)
    pairs = [(i, int(other)) for i, other in enumerate(order) if i != other]
    right = [scenes.check(world[i]["image"], world.prompt(other)) for i, other in pairs]
    return sum(right), len(right)


def check(f: Findings) -> list[Control]:
    """The controls that the findings have something for."""
    if not f.scored or not f.suite.get("chance"):
        return []
    right, count = f.suite["chance"]
    told = f"Perfect pictures of other prompts satisfy a prompt {right / count:.2%} of the time: "
    found = [Control(True, told + "that is chance.")]
    found.append(_every_row(f, "Pictures against the prompts of others", "shuffled"))
    found.append(_every_row(f, "Pictures of the empty prompt", "null"))
    for row in f.controls:
        passed, seen = _at_chance(f, list(f.scores[row].values()), 1)
        what = f"`{row}`, trained with the captions of other pictures, satisfies a prompt {seen}"
        found.append(Control(passed, f"{what}: {'chance' if passed else 'ABOVE chance'}."))
    return found + _random(f)


def _every_row(f: Findings, what: str, name: str) -> Control:
    """A control of every row; told is the one that scores most."""
    shares = {row: [run["controls"][name] for run in f.runs[row].values()] for row in f.rows}
    worst = max(shares, key=lambda row: sum(shares[row]) / len(shares[row]))
    results = {row: _at_chance(f, found, len(shares)) for row, found in shares.items()}
    wrong = [row for row, (passed, _) in results.items() if not passed]
    told = f"{what} satisfy a prompt at most (`{worst}`) {results[worst][1]}"
    if wrong:
        return Control(False, f"{told}: ABOVE chance for {', '.join(wrong)}.")
    return Control(True, f"{told}: chance, for every row.")


def _at_chance(f: Findings, shares: list[float], tests: int) -> tuple[bool, str]:
    """Whether some scores are not above chance, as one of so many tests; and what was seen."""
    right, count = f.right(shares)
    by_chance, of = f.suite["chance"]
    # Fisher's exact test of two proportions, this one the larger.
    table = [[right, count - right], [by_chance, of - by_chance]]
    p = stats.fisher_exact(table, alternative="greater").pvalue
    low, high = wilson(right, count)
    return p > _LEVEL / tests, f"{right} of {count:,} times (95%: {low:.2%} to {high:.2%})"


def _random(f: Findings) -> list[Control]:
    """Rows of a language model that was never trained, and those that it is compared with."""
    found = []
    for row in f.rows:
        own = dict(f.diffs[row])
        if own.pop("pretrain.steps", None) != 0:
            continue
        others = [r for r in f.rows if r != row and _without_pretraining(f.diffs[r]) == own]
        for other in others:
            seen = f.against([(row, other)], f.scores).get((row, other))
            if seen is None or seen.half is None:
                continue  # one seed cannot tell
            passed = seen.value <= seen.half
            words = "not better than" if passed else "BETTER than"
            told = f"`{row}`, whose language model has random weights, is {words} `{other}`: "
            found.append(Control(passed, f"{told}{seen.value:+.3f} ± {seen.half:.3f}."))
    return found


def _without_pretraining(diff: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in diff.items() if key != "pretrain.steps"}
