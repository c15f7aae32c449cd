"""Drawn images on disk, with all that made them: in each PNG, and as lines of JSON beside them.

    00000.png 00001.png ...   numbered: what a prompt says never becomes a path
    images.jsonl              a line for each: file, prompt, seed, number, how it was drawn
    config.json               of the model

A PNG holds the same line under the key "drawn", and the config under "config".
"""

from collections.abc import Mapping, Sequence
import json
import sys
from typing import Any

from etils import epath
import numpy as np
from PIL import Image, PngImagePlugin

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.evaluation import pictures
from t2i_jax.options import Options
from t2i_jax.pipeline import Pipeline

LINES = "images.jsonl"


def read_prompts(name: str) -> list[str]:
    """The prompts of a text file, one a line; '-' is standard input. Lines of nothing are none.

    Raises MissingError where there is no such file, or no prompt in it.
    """
    if name == "-":
        text = sys.stdin.buffer.read()
    else:
        file = epath.Path(name)
        if not file.is_file():
            raise MissingError(f"--prompts_file={name}: no such file.")
        text = file.read_bytes()
    try:
        lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise MissingError(f"--prompts_file={name} is not UTF-8: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise MissingError(f"--prompts_file={name} holds no prompt.")
    return prompts


def how_drawn(pipeline: Pipeline, options: Options) -> dict[str, Any]:
    """What is to be told of how images were drawn, for JSON."""
    return {
        "checkpoint_step": pipeline.step,
        "height": options.height,
        "width": options.width,
        "steps": len(options.levels) - 1,
        "first_level": round(options.start, 6),
        "solver": options.solver,
        "guidance_scale": options.scale,
        "guidance": None if options.guidance is None else options.guidance.told(),
    }


def save_grid(
    file: epath.Path,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    each: int,
    told: Mapping[str, Any],
    pipeline: Pipeline,
) -> None:
    """One captioned picture of all images, `each` of a prompt, with `told` of them.

    Up to eight prompts have a column each; of one, or of more, images follow each other.
    """
    count, columns = len(images) // each, 8
    order = list(range(len(images)))
    if 1 < count <= columns:
        order, columns = [i * each + k for k in range(each) for i in range(count)], count
    shown = [images[i] for i in order], [prompts[i] for i in order]
    sheet = pictures.grid(*shown, columns=columns)
    save_png(file, sheet, {"prompts": list(prompts), **told}, configs.to_json(pipeline.config))


def save_files(
    folder: epath.Path,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    told: Mapping[str, Any],
    pipeline: Pipeline,
) -> None:
    """Images as files of their own, numbered in order, with `told` of all and a line for each.

    Raises ConfigError where they cannot be written.
    """
    config = configs.to_json(pipeline.config)
    lines = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            line = {"file": f"{i:05d}.png", "number": i, "prompt": prompt, **told}
            save_png(folder / line["file"], Image.fromarray(image), line, config)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / LINES).write_text("".join(lines), encoding="utf-8")
        (folder / "config.json").write_text(config)
    except OSError as error:
        raise ConfigError(f"Images cannot be written to {folder}: {error}.") from error


def save_png(file: epath.Path, image: Image.Image, drawn: Any, config: str = "") -> None:
    """A PNG with what made it; `drawn` is anything for JSON, `config` a config's JSON, or ''."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("drawn", json.dumps(drawn, ensure_ascii=False))
    if config:
        text.add_itxt("config", config, zip=True)
    with file.open("wb") as out:
        image.save(out, "PNG", pnginfo=text)
