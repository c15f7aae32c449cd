"""The model that low-rank factors are for: the same as at the start, and merged with them.

A run that trains factors stores them, not their base, which stays where weights.start says. So that
they are never put on another model, the run keeps checksums of the base, which is compared with
them whenever it is read, layer by layer, whatever its format:

    <workdir>/base.json     {'crc32': {path: [of float32 values, layer by layer]}}
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any
import zlib

from etils import epath
import numpy as np

from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.interop import native
from t2i_jax.interop.mapping import Source
from t2i_jax.interop.stored import Stored
from t2i_jax.models import lora

_FILE = "base.json"
_TRAINED = ("dit", "memory")  # parts that factors are of


@dataclasses.dataclass(frozen=True)
class Watched:
    """A source whose checksums are compared with those that are known, or noted if none are."""

    source: Source
    path: str
    sums: dict[int, int]  # layer -> CRC-32
    complaint: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return self.source.dtype

    @property
    def stacked(self) -> bool:
        """Whether it is read, and summed, layer by layer."""
        return "{L}" in native.flat_name(self.path)

    def read(self, layer: int | None = None) -> np.ndarray:
        """That layer, or the whole. Raises ConfigError where it is not what it was."""
        if layer is None and self.stacked:
            return np.stack([self.read(i) for i in range(self.shape[0])])
        x = self.source.read(layer)
        found = zlib.crc32(np.ascontiguousarray(x, np.float32))
        if self.sums.setdefault(layer or 0, found) != found:
            raise ConfigError(f"{self.complaint} ({self.path} is another).")
        return x


@dataclasses.dataclass(frozen=True)
class Merged:
    """W + scale A B, of a source of W."""

    source: Watched
    a: np.ndarray
    b: np.ndarray
    scale: float
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self.source.shape

    @property
    def stacked(self) -> bool:
        """Whether it is made layer by layer."""
        return self.source.stacked

    def read(self, layer: int | None = None) -> np.ndarray:
        """That layer, or the whole."""
        if not self.stacked:
            return lora.merged(self.source.read(), self.a, self.b, self.scale)
        if layer is None:
            return np.stack([self.read(i) for i in range(self.shape[0])])
        return lora.merged(self.source.read(layer), self.a[layer], self.b[layer], self.scale)


def require(start: str) -> None:
    """Raises MissingError where there is nothing at weights.start."""
    if not epath.Path(start).exists():
        raise MissingError(
            f"weights.start = {start!r}: no such directory. It is the base of the low-rank "
            "factors, which are nothing without it: an import, an export or a run of that model. "
            "Put it there, or a link to it; a run that trains may name it by "
            "--config.weights.start."
        )


def watch(base: Stored, workdir: epath.PathLike, *, new: bool = False) -> Stored:
    """The base of the run in `workdir`, watched while it is read.

    A `new` run has none yet, and keeps what is read by `keep`. Raises MissingError where an older
    one does not say what its base was; reading raises ConfigError where it was another.
    """
    file = epath.Path(workdir) / _FILE
    if not new and not file.exists():
        raise MissingError(f"{file} is not there; it says which model the factors are for.")
    known = {} if new else json.loads(file.read_text())["crc32"]
    complaint = (
        f"{base.where} is not the model that {workdir} trains factors for: set weights.start to "
        "the model of its beginning; of a run that went on, name the checkpoint"
    )
    trained = {p: s for p, s in base.weights.items() if p.split("/")[0] in _TRAINED}
    if known and known.keys() != trained.keys():
        raise ConfigError(f"{complaint} (it has other parameters).")
    watched = {
        path: Watched(source, path, dict(enumerate(known.get(path, ()))), complaint)
        for path, source in trained.items()
    }
    return dataclasses.replace(base, weights={**base.weights, **watched})


def keep(base: Stored, workdir: epath.PathLike) -> None:
    """Notes what the base of a new run is, after all of it was read."""
    watched = {p: s for p, s in base.weights.items() if isinstance(s, Watched)}
    sums = {path: [source.sums[i] for i in sorted(source.sums)] for path, source in watched.items()}
    new = epath.Path(workdir) / f"{_FILE}.new"
    new.write_text(json.dumps({"crc32": sums}))
    new.replace(epath.Path(workdir) / _FILE)


def merge(base: Stored, factors: Mapping[str, np.ndarray], scale: float) -> dict[str, Any]:
    """The trained parameters of a watched base, with the factors, by path, merged into them."""
    found = {p: s for p, s in base.weights.items() if isinstance(s, Watched)}
    for path in {path.rpartition("/")[0] for path in factors}:
        weight = f"{path}/weight"
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        found[weight] = Merged(found[weight], a, b, scale)
    return found
