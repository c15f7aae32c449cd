"""DPG-Bench (Hu et al., arXiv 2403.05135): its files, its scorer, its table.

1,065 long prompts, four images each in one file, two rows of two, about which a model that answers
questions is asked. The official scorer cuts every file of a folder into four squares of a given
size and takes the name of the file for the prompt's:

    images/<prompt>.png               of prompts/<prompt>.txt

A prompt's score is the share of its questions that are answered with yes, those that rest on one
answered with no counted as no; the score of the benchmark is the mean over prompts, times 100.
"""

import re
from typing import Any

from etils import epath
import numpy as np

from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.evaluation.drawn import Item
from t2i_jax.evaluation.intervals import resampled

PER_PROMPT = 4
FOLDER = "images"  # nothing but images: the scorer opens all that is there
WHERE = "the folder dpg_bench/prompts of github.com/TencentQQGYLab/ELLA"


def read_prompts(path: str) -> dict[str, str]:
    """{name: prompt} of a folder of text files, by name. Raises MissingError, ConfigError."""
    folder = epath.Path(path)
    if not folder.is_dir():
        raise MissingError(f"--prompts={path}: no such folder. It is {WHERE}.")
    files = sorted(file for file in folder.iterdir() if file.suffix == ".txt")
    found = {}
    for file in files:
        try:
            found[file.stem] = " ".join(file.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is no text in UTF-8: {error}.") from error
    if not found or not all(found.values()):
        bad = [name for name, text in found.items() if not text]
        raise ConfigError(f"{path} has empty prompts {bad[:5]}, or none; it should be {WHERE}.")
    return found


def items(prompts: dict[str, str]) -> list[Item]:
    """A file of four images for each prompt."""
    return [
        Item(f"{FOLDER}/{name}.png", text, tuple(range(PER_PROMPT * i, PER_PROMPT * (i + 1))))
        for i, (name, text) in enumerate(prompts.items())
    ]


def command(python: str, folder: epath.Path, results: epath.Path, side: int) -> list[str]:
    """What runs the official scorer in its checkout, by one process of accelerate."""
    return [
        *(python, "-m", "accelerate.commands.launch", "--num_processes=1"),
        "dpg_bench/compute_dpg_bench.py",
        f"--image-root-path={folder / FOLDER}",
        f"--res-path={results}",
        f"--resolution={side}",
        f"--pic-num={PER_PROMPT}",
        "--vqa-model=mplug",
    ]


def read_results(path: epath.PathLike) -> dict[str, Any]:
    """The table of the scorer's text, of 100: score, interval, categories; and which it is of.

    The score and its interval are of the lines of single prompts, the latter resampling these; the
    categories are those that the scorer sums up itself, without numbers of questions.

    Raises MissingError, ConfigError where these are no results.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise MissingError(f"{path}: no such results of DPG-Bench's scorer.")
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"(?:.*/)?([^/]+)\.png((?:, [\d.]+)+)", line) for line in lines]
    scores = {m[1]: 100 * float(m[2].rsplit(", ", 1)[1]) for m in found if m}
    if not scores or not np.isfinite([*scores.values()]).all():
        raise ConfigError(f"{path} has no scores of prompts: it is no result of DPG-Bench.")
    categories = {}
    start = lines.index("L1 category scores:") + 1 if "L1 category scores:" in lines else len(lines)
    for line in lines[start:]:
        part = re.fullmatch(r"\t(.+): ([\d.]+)", line)
        if not part:
            break
        categories[part[1]] = {"fraction": float(part[2]), "interval": None}
    return {
        "metric": "DPG score",
        "better": "higher",
        "score": float(np.mean([*scores.values()])),
        "interval": resampled([[[score] for score in scores.values()]]),
        "categories": categories,
        "scored": {name: PER_PROMPT for name in scores},
    }
