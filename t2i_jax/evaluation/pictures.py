"""Pictures for people: generated images with their prompts, and the curves of a run."""

from collections.abc import Mapping, Sequence
import io
from pathlib import Path
from typing import Any

from etils import epath
import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2i_jax.errors import ConfigError, MissingError

GAP = 8  # pixels between cells, and around them
_LINES = 6  # of a caption
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def grid(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int, cell: int = 144
) -> Image.Image:
    """uint8 (H, W, 3) images in rows of `columns`, each in a square of `cell` pixels, captioned.

    Small images are enlarged by a whole factor, so that their pixels can be seen; larger ones are
    reduced to fit. Raises ValueError for other images, or where captions do not match.
    """
    if len(images) != len(captions) or not len(images) or columns < 1:
        raise ValueError(
            f"A grid has one caption an image, and one column or more: got {len(images)} images, "
            f"{len(captions)} captions, {columns} columns."
        )
    columns = min(columns, len(images))
    letters = font(max(10, cell // 12))
    line = sum(letters.getmetrics()) + 1
    texts = [_shortened(wrap(caption, letters, cell)) for caption in captions]
    rows = range(0, len(images), columns)
    tops, y = [], GAP
    for row in rows:
        tops.append(y)
        y += cell + 4 + line * max(len(text) for text in texts[row : row + columns]) + GAP
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = GAP + (i % columns) * (cell + GAP), tops[i // columns]
        picture = fit(np.asarray(image), cell)
        offset = ((cell - picture.width) // 2, (cell - picture.height) // 2)
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        for k, words in enumerate(text):
            draw.text((left, top + cell + 4 + k * line), words, fill=_INK, font=letters)
    return sheet


def _shortened(lines: list[str]) -> list[str]:
    """At most _LINES of a caption."""
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], lines[_LINES - 1] + " ..."]


def read(path: epath.PathLike) -> Image.Image:
    """A picture from a file, in RGB. Raises MissingError for none, ConfigError for what is none."""
    file = epath.Path(path)
    if not file.is_file():
        raise MissingError(f"{path}: no such picture.")
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is no picture that can be read: {error}.") from error


def fit(image: np.ndarray, cell: int) -> Image.Image:
    """uint8 (H, W, 3), at most `cell` pixels a side: enlarged by a whole factor, or reduced."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"An image is uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    height, width = image.shape[:2]
    factor = cell // max(height, width)
    if factor >= 1:
        return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))
    scale = cell / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it: the same on every machine."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def loss_plot(metrics: Sequence[Mapping[str, Any]], path: epath.PathLike) -> None:
    """A PNG of a run's metrics.jsonl: losses, and the learning rate below them.

    Reads 'loss', 'validation_loss' and 'learning_rate', each where it is. Raises ValueError where
    there is no loss.
    """
    steps, losses = _series(metrics, "loss")
    if not len(steps):
        raise ValueError("There is no 'loss' in these metrics: nothing to plot.")
    rate_steps, rates = _series(metrics, "learning_rate")
    panels = 2 if len(rates) else 1
    figure = Figure(figsize=(7.0, 3.6 + 1.2 * (panels - 1)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[:panels])[
        :, 0
    ]

    _plot_losses(axes[0], steps, losses, *_series(metrics, "validation_loss"))
    if panels == 2:
        axes[1].plot(rate_steps, rates, color="tab:green")
        axes[1].set_ylabel("learning rate")
        axes[1].set_ylim(bottom=0)
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    epath.Path(path).write_bytes(png.getvalue())


def _plot_losses(axis: Axes, steps, losses, validation_steps, validation) -> None:
    window = max(1, len(losses) // 50)
    smooth = _smooth(losses, window)
    name = "training" if window == 1 else f"training, mean of {window}"
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color="tab:blue", label=name)
    if len(validation):
        style = {"marker": "o", "markersize": 4, "linewidth": 1.0, "color": "tab:orange"}
        axis.plot(validation_steps, validation, label="validation", **style)
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    shown = np.concatenate([smooth, validation])
    shown = shown[np.isfinite(shown)]
    if len(shown) and shown.min() > 0 and shown.max() > 5 * shown.min():
        axis.set_yscale("log")
        axis.set_ylim(0.7 * shown.min(), 1.4 * shown.max())  # not the outliers of single batches
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the entries that have `name`."""
    points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each, of fewer at the ends."""
    before, after = (window - 1) // 2, window // 2
    parts = (values[max(0, i - before) : i + after + 1] for i in range(len(values)))
    return np.array([part.mean() for part in parts])
