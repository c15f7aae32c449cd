"""Arrays of a tree on disk, of which a layer can be read alone: what exports are made from."""

import dataclasses

from etils import epath
import numpy as np
import tensorstore as ts

from t2i_jax.errors import MissingError

_CACHE = 512_000_000  # bytes of pieces that are kept while the layers in them are asked for


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a saved tree, which a layer can be read of."""

    _store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self._store.shape

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return self._store.dtype.numpy_dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """`array[layer]`, or the whole."""
        part = self._store if layer is None else self._store[layer]
        return part.read().result()


def tree_sources(path: epath.PathLike) -> dict[str, StoredArray]:
    """Path ('dit/out/bias') -> array of a tree of nested dicts on disk, none of them read yet.

    Reads Orbax's format as it is documented: one zarr array a leaf, named after its keys with dots
    between them, all in one OCDBT database.
    """
    base = url(path)
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    ends = "/.zarray"
    names = [k.decode().removesuffix(ends) for k in keys if k.decode().endswith(ends)]
    if not names:
        raise MissingError(f"There are no saved arrays in {path}.")

    def opened(name):
        place = {"driver": "ocdbt", "base": base, "path": name}
        return ts.open({"driver": "zarr", "kvstore": place}, context=context, read=True)

    waiting = {name.replace(".", "/"): opened(name) for name in names}
    return {name: StoredArray(store.result()) for name, store in waiting.items()}


def url(path: epath.PathLike) -> str:
    """A path as TensorStore takes it."""
    text = absolute(path).as_posix()
    return text if "://" in text else f"file://{text}"


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that holds in any working directory; gs://... is one already."""
    path = epath.Path(path)
    return path if path.is_absolute() else path.absolute()
