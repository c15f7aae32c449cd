"""The same prompts and the same noise by every row of a suite, to look at side by side."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_jax.study import figures, parts
from t2i_jax.study.findings import Findings

STRIP = "strip.png"  # in a run's directory: its pictures, one beside the other


def draw(folder: Path, root: Path) -> None:
    """Draws the prompts of a run's config by its averaged weights, into the run's directory."""
    from t2i_jax.pipeline import Pipeline

    config = parts.located(parts.read(folder), root)
    pipeline = Pipeline.load(folder)
    images = pipeline.draw(list(config.sampling.prompts), seed=0)
    out = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(out, format="png")
    new = folder / f"{STRIP}.new"
    new.write_bytes(out.getvalue())
    new.replace(folder / STRIP)


def sheet(findings: Findings, folders: dict[str, Path], prompts: list[str], out: Path) -> None:
    """Writes the sheet of the rows that have a strip, where there is any."""
    strips = []
    for row in findings.rows:
        file = folders[row] / STRIP
        if file.exists():
            strip = np.asarray(Image.open(file).convert("RGB"))
            strips.append((row, np.stack(np.split(strip, len(prompts), axis=1))))
    if strips:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(figures.png(figures.sheet(strips, prompts)))
