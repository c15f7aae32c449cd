"""Files of one JSON object a line, each with its 'step', that a resumed run continues.

Numbers are written so that they parse back to the same bits.
"""

from collections.abc import Mapping
import json
import os
import time
from typing import Any

from etils import epath

_REMOTE_INTERVAL = 60.0  # seconds


class JsonLines:
    """Appends to `path`. What is there after `resume_step`, and a torn last line, is dropped.

    A line is in the file at once; where nothing can be appended to a file (gs://...), it is there
    at `flush` and `close`, and `interval` seconds after the last time at the latest with the next.

    Attributes:
      kept: the entries that were there.
    """

    def __init__(
        self, path: epath.PathLike, resume_step: int = 0, interval: float = _REMOTE_INTERVAL
    ):
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.kept, text = _drop_after(self.path, resume_step)
        self._remote = "://" in os.fspath(self.path)
        self._lines = [text] if self._remote else []
        self._interval, self._uploaded, self._pending = interval, time.monotonic(), False
        self._file = None if self._remote else self.path.open("a")

    def append(self, entry: Mapping[str, Any]) -> None:
        """One line."""
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        self._pending = True
        if time.monotonic() - self._uploaded >= self._interval:
            self.flush()

    def flush(self) -> None:
        """What was appended is in the file after it."""
        if self._pending:
            self.path.write_text("".join(self._lines))
            self._uploaded, self._pending = time.monotonic(), False

    def close(self) -> None:
        """Writes what is pending; a second call does nothing."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The entries of a file.

    A last line without its end (it is being written, or its writer was killed) is left out. Raises
    ValueError for any other line that is no entry.
    """
    return [entry for entry, _ in _complete_lines(epath.Path(path))]


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


def _drop_after(path: epath.Path, step: int) -> tuple[list[dict[str, Any]], str]:
    """Leaves the complete entries up to `step` in the file, all or nothing."""
    if not path.exists():
        return [], ""
    lines = [(entry, line) for entry, line in _complete_lines(path) if entry["step"] <= step]
    kept = "".join(line for _, line in lines)
    if kept.encode() != path.read_bytes():
        new = path.parent / f"{path.name}.new"
        new.write_text(kept)
        new.replace(path)
    return [entry for entry, _ in lines], kept
