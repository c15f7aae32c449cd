"""Large arrays handed to worker processes as files that all of them map, not as copies."""

import atexit
import os
import shutil
import tempfile
from typing import Any

import numpy as np

_LEAST = 1 << 20  # bytes of an array from which on it is worth a file
_folder: str | None = None
_files: dict[int, tuple[np.ndarray, str]] = {}  # id -> the array, kept alive, and its file


def pack(array: np.ndarray) -> Any:
    """What to pickle in place of `array`; `unpack` makes it an array again, read-only if large."""
    if array.nbytes < _LEAST or array.dtype.hasobject:
        return array
    if id(array) not in _files:
        _files[id(array)] = (array, os.path.join(_directory(), f"{len(_files)}.npy"))
        np.save(_files[id(array)][1], array, allow_pickle=False)
    return _Mapped(_files[id(array)][1])


def unpack(packed: Any) -> np.ndarray:
    """The array of `pack`; a large one is mapped, and OSError tells that its file is gone."""
    if isinstance(packed, _Mapped):
        return np.load(packed.path, mmap_mode="r", allow_pickle=False)
    return packed


class _Mapped:
    def __init__(self, path: str):
        self.path = path


def _directory() -> str:
    """A folder of this process, removed when it ends."""
    global _folder
    if _folder is None:
        _folder = tempfile.mkdtemp(prefix="t2i_jax-")
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder
