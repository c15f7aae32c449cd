"""What must come out right, or the laboratory is broken and nothing else counts.

- Pictures against the prompts of other pictures, and pictures of the empty prompt, are right as
  often as by chance: no more often than perfect pictures of other prompts are (`chance`).
- So are pictures of a row that was trained with the captions of others.
- A row `llm-random`, whose language model has random weights, is not better than the first row.
"""

from typing import NamedTuple

import numpy as np

from t2i_jax.evaluation.intervals import wilson
from t2i_jax.study.findings import Findings

RANDOM = "llm-random"
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
    limit = wilson(*f.suite["chance"])[1]
    perfect = f.suite["chance"][0] / f.suite["chance"][1]
    found = [
        Control(
            True,
            f"Perfect pictures of other prompts satisfy a prompt {perfect:.2%} of the time: "
            "that is chance.",
        )
    ]
    for name, what in (
        ("shuffled", "Pictures against the prompts of others"),
        ("null", "Pictures of the empty prompt"),
    ):
        shares = [run["controls"][name] for row in f.rows for run in f.runs[row].values()]
        found.append(_at_chance(f"{what}, of all runs,", shares, f.suite["images"], limit))
    for row in f.floor:
        shares = list(f.scores[row].values())
        what = f"`{row}`, trained with the captions of other pictures,"
        found.append(_at_chance(what, shares, f.suite["images"], limit))
    if RANDOM in f.rows and f.first != RANDOM:
        seen = f.against([(RANDOM, f.first)], f.scores)[RANDOM, f.first]
        passed = seen.half is None or seen.value <= seen.half
        words = "not better than" if passed else "BETTER than"
        within = "" if seen.half is None else f" ± {seen.half:.3f}"
        told = f"`{RANDOM}`, whose language model has random weights, is {words} `{f.first}`: "
        found.append(Control(passed, f"{told}{seen.value:+.3f}{within}."))
    return found


def _at_chance(what: str, shares: list[float], images: int, limit: float) -> Control:
    """Whether the mean of some scores, each of so many pictures, is not above chance."""
    count = len(shares) * images
    right = round(sum(shares) * images)
    low, high = wilson(right, count)
    passed = low <= limit
    words = "chance" if passed else "ABOVE chance"
    told = f"{right} of {count:,} times (95%: {low:.2%} to {high:.2%})"
    return Control(passed, f"{what} satisfy a prompt {told}: {words}.")
