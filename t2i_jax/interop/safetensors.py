"""The safetensors format, read and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape
and range of bytes) and the data (https://github.com/huggingface/safetensors). A model of several
files has an index beside them (JSON: name -> file). Nothing in it can run code; other formats that
weights come in are pickles, which can, and which are never opened here.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import math
from typing import NamedTuple

from etils import epath
import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),  # may be there, and is never a weight: old CLIPs stored positions
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, not read yet."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes

    def read(self) -> np.ndarray:
        """The tensor in its own dtype, read-only. Raises ValueError for integers."""
        if self.dtype == np.int64:
            raise ValueError(f"{self.file}: a weight is of {self.dtype}, not of floats.")
        with self.file.open("rb") as f:
            f.seek(self.start)
            data = f.read(self.size)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def open_tensors(files: Iterable[epath.Path]) -> dict[str, Tensor]:
    """Name -> tensor of all the safetensors files; raises ValueError where one is damaged."""
    tensors = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in tensors:
                raise ValueError(f"{tensors[name].file} and {file} both hold {name}.")
            tensors[name] = tensor
    return tensors


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]  # called when its turn comes; of that shape, any float dtype

    def size(self, dtype: np.dtype) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * dtype.itemsize


def write(
    directory: epath.Path,
    stem: str,
    entries: Sequence[Entry],
    dtype: str,
    *,
    max_bytes: int = 2_000_000_000,
    progress: Callable[[int], None] | None = None,
) -> list[epath.Path]:
    """Writes `stem`.safetensors, or numbered parts of at most `max_bytes` and their index.

    One tensor is in memory at a time. A tensor that is larger than a part is a part of its own.

    Args:
      directory: exists; what it holds of that name is replaced.
      stem: 'model' or 'diffusion_pytorch_model'.
      entries: in the order in which they are written; names differ.
      dtype: 'float32', 'bfloat16' or 'float16', of the files.
      max_bytes: of the data of one part.
      progress: called with the bytes written since it was last called.

    Raises ValueError naming a tensor that is not finite, or not of its shape.
    """
    target = np.dtype(jnp.dtype(dtype))
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.size(target) > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.size(target)
    names = [f"{stem}-{k + 1:05}-of-{len(parts):05}.safetensors" for k in range(len(parts))]
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    for name, part in zip(names, parts, strict=True):
        _write_file(directory / name, part, target, progress)
    if len(parts) > 1:
        where = {e.name: name for name, part in zip(names, parts, strict=True) for e in part}
        total = sum(entry.size(target) for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return [directory / name for name in names]


def _write_file(file, entries, dtype: np.dtype, progress) -> None:
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size(dtype)
        shape = list(entry.shape)
        header[entry.name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            x = entry.make()
            if x.shape != tuple(entry.shape):
                raise ValueError(f"{entry.name} is {x.shape}, not {tuple(entry.shape)}.")
            with np.errstate(over="ignore"):  # what is too large is said, not warned of
                x = np.ascontiguousarray(x, dtype)
            if not _finite(x):
                raise ValueError(f"{entry.name} has elements that are no finite {dtype}.")
            f.write(x.reshape(-1).view(np.uint8).data)
            if progress:
                progress(x.nbytes)


def _finite(x: np.ndarray) -> bool:
    flat, step = x.reshape(-1), 1 << 24
    starts = range(0, len(flat), step)
    if x.dtype == jnp.bfloat16:  # by its bits, without a copy in float32
        flat, exponent = flat.view(np.uint16), np.uint16(0x7F80)
        return all(np.all((flat[i : i + step] & exponent) != exponent) for i in starts)
    return all(np.isfinite(flat[i : i + step]).all() for i in starts)


def _header(file: epath.Path) -> dict[str, Tensor]:
    """The tensors of one file; every range of bytes is checked against the file's size."""

    def broken(what):
        return ValueError(f"{file} is not a whole safetensors file: {what}. Fetch it again.")

    total = file.stat().length
    with file.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if total < 8 or start > min(total, _MAX_HEADER):
            raise broken(f"its header ends at byte {start}, the file at {total}")
        try:
            header = dict(json.loads(f.read(start - 8)))
        except (ValueError, TypeError) as error:
            raise broken(f"its header does not parse ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = (entry[k] for k in ("dtype", "shape", "data_offsets"))
            known = dtype in _DTYPES
            whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of {name} is {entry!r}") from error
        if not known:
            raise ValueError(f"{file}: {name} is {dtype!r}; weights are one of {list(_DTYPES)}.")
        size = math.prod(shape) * _DTYPES[dtype].itemsize if whole else -1
        if not whole or last - first != size or start + last > total:
            raise broken(f"{name}, {dtype} {shape}, is at bytes {first} to {last} of its data")
        tensors[name] = Tensor(file, _DTYPES[dtype], tuple(shape), start + first, size)
    return tensors
