"""What a run tells: metrics.jsonl, speed.jsonl, TensorBoard, and Weights & Biases where asked.

A resumed run continues metrics.jsonl as if it had never stopped.
"""

from collections.abc import Mapping
import io
import os
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from t2i_jax import jsonlines
from t2i_jax.jsonlines import JsonLines
from t2i_jax.training.wandb_log import WandbLog

FILE = "metrics.jsonl"
SPEED = "speed.jsonl"


class MetricWriter:
    """Scalars and images of a run, to `workdir`/metrics.jsonl and `workdir`/tensorboard.

    And to `wandb`, if given. One process writes. What a previous run wrote after `resume_step`, and
    a last line that it did not finish, are dropped.
    """

    def __init__(
        self, workdir: epath.PathLike, resume_step: int = 0, wandb: WandbLog | None = None
    ):
        from tensorboardX import SummaryWriter  # takes a while to import

        workdir = epath.Path(workdir)
        self._lines = JsonLines(workdir / FILE, resume_step)
        self._speed = JsonLines(workdir / SPEED, resume_step)
        self._tensorboard = SummaryWriter(
            os.fspath(workdir / "tensorboard"), purge_step=resume_step + 1
        )
        self._wandb = wandb

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; values are numbers or arrays of one number. Raises ValueError else."""
        values = {name: _number(name, value) for name, value in values.items()}
        self._lines.append({"step": int(step), **values})
        self._show(step, values)

    def speed(self, step: int, values: Mapping[str, float]) -> None:
        """One line of speed.jsonl: what is another number every time does not belong in metrics."""
        self._speed.append({"step": int(step), **values})
        self._show(step, {f"speed/{name}": value for name, value in values.items()})

    def image(
        self, step: int, name: str, image: np.ndarray, path: epath.PathLike | None = None
    ) -> None:
        """A uint8 (H, W, 3) image to TensorBoard, and as PNG to `path`, if given."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name}: uint8 (H, W, 3) expected, got {image.dtype} {image.shape}.")
        if path is not None:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            path = epath.Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png.getvalue())
        self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            self._wandb.image(int(step), name, image)

    def flush(self) -> None:
        """The lines so far are stored after it."""
        self._lines.flush()
        self._speed.flush()

    def close(self, *, finished: bool = True) -> None:
        """Writes what is pending; a second call does nothing. `finished`: the last step is done."""
        self._lines.close()
        self._speed.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.close(finished=finished)

    def _show(self, step: int, values: Mapping[str, int | float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.scalars(int(step), values)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run's directory.

    A last line without its end (it is being written, or its writer was killed) is left out. Raises
    ValueError for any other line that is not JSON.
    """
    path = epath.Path(path)
    return jsonlines.read(path / FILE if path.is_dir() else path)


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16
        raise ValueError(f"{name}: one number expected, got {array.dtype} {array.shape}.")
    return (
        int(array.item()) if array.dtype.kind in "biu" else float(array.astype(np.float64).item())
    )
