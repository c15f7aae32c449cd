"""What a run tells: metrics.jsonl, TensorBoard.

metrics.jsonl has one JSON object a line, each with its 'step'. Numbers are written so that they
parse back to the same bits; a resumed run continues the file as if it had never stopped.
"""

from collections.abc import Mapping
import io
import json
import os
import time
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

FILE = "metrics.jsonl"
_REMOTE_INTERVAL = 60.0  # seconds between uploads, where a file cannot be appended to


class MetricWriter:
    """Scalars and images of a run, to `workdir`/metrics.jsonl and `workdir`/tensorboard.

    One process writes. What a previous run wrote after `resume_step`, and a last line that it did
    not finish, are dropped.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0):
        from tensorboardX import SummaryWriter  # takes a while to import

        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE
        kept = _drop_after(self._path, resume_step)
        self._remote = "://" in os.fspath(workdir)
        self._lines = [kept] if self._remote else []
        self._uploaded = time.monotonic()
        self._file = None if self._remote else self._path.open("a")
        self._tensorboard = SummaryWriter(
            os.fspath(workdir / "tensorboard"), purge_step=resume_step + 1
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; values are numbers or arrays of one number. Raises ValueError else."""
        values = {name: _number(name, value) for name, value in values.items()}
        line = json.dumps({"step": int(step), **values}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._uploaded > _REMOTE_INTERVAL:
                self._upload()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

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

    def close(self) -> None:
        """Writes what is pending; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        else:
            self._upload()
        self._tensorboard.close()

    def _upload(self) -> None:
        self._path.write_text("".join(self._lines))
        self._uploaded = time.monotonic()


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run's directory.

    A last line without its end (it is being written, or its writer was killed) is left out. Raises
    ValueError for any other line that is not JSON.
    """
    path = epath.Path(path)
    path = path / FILE if path.is_dir() else path
    return [entry for entry, _ in _complete_lines(path)]


def _complete_lines(path: epath.Path) -> list[tuple[dict[str, Any], str]]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.split("\n")[:-1]  # after the last line's end comes nothing, or a torn line
    out = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not an entry: {line[:80]!r}") from error
        out.append((entry, line + "\n"))
    return out


def _drop_after(path: epath.Path, step: int) -> str:
    """Leaves the complete lines up to `step` in the file, all or nothing; returns their text."""
    if not path.exists():
        return ""
    kept = "".join(line for entry, line in _complete_lines(path) if entry["step"] <= step)
    if kept.encode() != path.read_bytes():
        new = path.parent / f"{path.name}.new"
        new.write_text(kept)
        new.replace(path)
    return kept


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16
        raise ValueError(f"{name}: one number expected, got {array.dtype} {array.shape}.")
    return (
        int(array.item()) if array.dtype.kind in "biu" else float(array.astype(np.float64).item())
    )
