"""GenEval (Ghosh et al., arXiv 2310.11513): its files, its scorer, its table.

553 prompts of six kinds, four images each, in which an object detector looks for what the prompt
asks for. The official scorer opens

    00000/metadata.jsonl              the prompt's line of its evaluation_metadata.jsonl
    00000/samples/0000.png ...        its images

in every folder whose name is a number, and writes a line of JSON for every image. The score of a
kind is the share of its images that pass, the overall score the mean over the kinds.
"""

from collections.abc import Sequence
import itertools
import json
from typing import Any

from etils import epath

from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.evaluation.drawn import Item
from t2i_jax.evaluation.intervals import proportion, resampled

PER_PROMPT = 4
KINDS = {  # of the metadata, and what the paper calls them
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colors",
    "position": "position",
    "color_attr": "color attribution",
}
WHERE = "evaluation_metadata.jsonl of github.com/djghosh13/geneval, prompts/"

Record = dict[str, Any]  # a line of the metadata: tag, prompt, include, ...


def read_prompts(path: str) -> list[Record]:
    """The lines of the metadata. Raises MissingError, ConfigError where they are none."""
    file = epath.Path(path)
    if not file.is_file():
        raise MissingError(f"--prompts={path}: no such file. It is {WHERE}.")
    records = []
    for i, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["tag"] not in KINDS or not isinstance(record["prompt"], str):
                raise ValueError(f"its tag is {record['tag']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {i} is no prompt of GenEval: {error}.") from error
        records.append(record)
    if not records:
        raise ConfigError(f"{path} holds no prompt. It should be {WHERE}.")
    return records


def items(records: Sequence[Record], per_prompt: int = PER_PROMPT) -> list[Item]:
    """A file for each image."""
    return [
        Item(f"{i:05d}/samples/{k:04d}.png", record["prompt"], (i * per_prompt + k,))
        for i, record in enumerate(records)
        for k in range(per_prompt)
    ]


def write_metadata(folder: epath.Path, records: Sequence[Record]) -> None:
    """The file beside the images that the scorer reads."""
    for i, record in enumerate(records):
        file = folder / f"{i:05d}" / "metadata.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))


def command(python: str, folder: epath.Path, results: epath.Path) -> list[str]:
    """What runs the official scorer in its checkout; it needs --model-path=DIR, too."""
    script = "evaluation/evaluate_images.py"
    return [python, script, str(folder), f"--outfile={results}"]


def read_results(path: epath.PathLike) -> dict[str, Any]:
    """The table of the scorer's lines: score, interval, categories; and which prompts it is of.

    The interval of the score resamples prompts within their kinds, whose images are not
    independent; those of the kinds are Wilson's, of images.

    Raises MissingError, ConfigError where these are no results.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise MissingError(f"{path}: no such results of GenEval's scorer.")
    passes: dict[str, dict[str, list[bool]]] = {kind: {} for kind in KINDS}
    for i, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
            about, right = json.loads(result["metadata"])["prompt"], result["correct"]
            if not isinstance(right, bool):
                raise ValueError(f"correct is {right!r}")
            passes[result["tag"]].setdefault(about, []).append(right)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {i} is no result of GenEval: {error}.") from error
    kinds = {kind: list(prompts.values()) for kind, prompts in passes.items() if prompts}
    if not kinds:
        raise ConfigError(f"{path} holds no result.")
    flat = {kind: [*itertools.chain(*prompts)] for kind, prompts in kinds.items()}
    categories = {KINDS[kind]: proportion(passed) for kind, passed in flat.items()}
    return {
        "metric": "accuracy",
        "better": "higher",
        "score": sum(part["fraction"] for part in categories.values()) / len(categories),
        "interval": resampled(list(kinds.values())),
        "categories": categories,
        "scored": {p: len(x) for kind in passes.values() for p, x in kind.items()},
    }
