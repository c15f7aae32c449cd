"""Benchmarks of prompt following that need nothing but a pipeline.

scenes   held-out compositions in six categories, read back from the pixels (evaluation/scenes.py);
         and two controls that show that the text is used: the same images scored against the
         prompts in another order, and the prompts against images of the empty prompt
digits   handwritten digits, told by a linear classifier trained on the real ones
"""

from collections.abc import Callable
import difflib
import json
from typing import Any

from etils import epath
import jax
import numpy as np

from t2i_jax.errors import ConfigError
from t2i_jax.pipeline import Pipeline
from t2i_jax.progress import Progress

Report = dict[str, Any]


def run(name: str, pipeline: Pipeline, num_images: int, seed: int) -> Report:
    """The report {'benchmark', 'score', ...}; the intervals tell of images, not of prompts.

    Raises ConfigError for an unknown name, or where the model was trained on another world.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}.{hint}")
    source = pipeline.config.data.source
    if source != name:
        raise ConfigError(
            f"The benchmark {name!r} is for models with data.source = {name!r}; this one was "
            f"trained on {source!r}."
        )
    report = BENCHMARKS[name](pipeline, num_images, seed)
    sampling = pipeline.config.sampling
    return {
        "benchmark": name,
        "num_images": num_images,
        "seed": seed,
        "sampling_steps": sampling.steps,
        "guidance": sampling.guidance,
        **report,
    }


def write(path: epath.PathLike, report: Report) -> None:
    """Writes a report as JSON, making its folder."""
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).write_text(json.dumps(report, indent=2) + "\n")


def table(report: Report) -> str:
    """A report as text."""
    lines = [f"{report['benchmark']}: {report['score']:.3f} on {report['num_images']} images"]
    for name, part in report.get("categories", {}).items():
        low, high = part["interval"]
        lines.append(f"  {name:<18} {part['fraction']:.2f}  (95%: {low:.2f} to {high:.2f})")
    for name, value in report.get("controls", {}).items():
        lines.append(f"  control, {name:<9} {value:.2f}")
    return "\n".join(lines)


def _draw(pipeline: Pipeline, prompts: list[str], seed: int, name: str) -> np.ndarray:
    with Progress(len(prompts), name=name, shown=jax.process_index() == 0) as bar:
        return pipeline.draw(prompts, seed=seed, progress=bar.update)


def _scenes(pipeline: Pipeline, num_images: int, seed: int) -> Report:
    from t2i_jax.data.scenes import Scenes
    from t2i_jax.evaluation import scenes

    source = Scenes(pipeline.config.data.image_size, "heldout", seed=seed, length=num_images)
    prompts = [source.prompt(i) for i in range(num_images)]
    images = _draw(pipeline, [prompt.text for prompt in prompts], seed, "drawing prompts")
    result = scenes.score(images, prompts)
    null = _draw(pipeline, [""] * num_images, seed, "drawing the null prompt")
    order = np.random.default_rng(seed).permutation(num_images)
    shuffled = [prompts[i] for i in order]  # now and then, another prompt asks for the same
    return {
        "score": result["overall"],
        "interval": result["micro"]["interval"],
        "categories": result["categories"],
        "controls": {
            "shuffled": scenes.score(images, shuffled)["overall"],
            "null": scenes.score(null, prompts)["overall"],
        },
    }


def _digits(pipeline: Pipeline, num_images: int, seed: int) -> Report:
    from t2i_jax.evaluation import digits

    labels = np.arange(num_images) % 10
    prompts = [f"a handwritten {digits.WORDS[label]}" for label in labels]
    images = _draw(pipeline, prompts, seed, "drawing prompts")
    size = pipeline.config.data.image_size
    return digits.score(images, labels, size, pipeline.config.data.validation_size)


BENCHMARKS: dict[str, Callable[[Pipeline, int, int], Report]] = {
    "scenes": _scenes,
    "digits": _digits,
}
