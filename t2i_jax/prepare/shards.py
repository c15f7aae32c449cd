"""Shards of the layout that training reads: written whole or not at all, and read again.

A shard is a tar file with the members KEY.FIELD of each sample, one after the other. Its bytes
depend on the samples alone: no times, no owners.
"""

from collections.abc import Mapping
import io
import os
import re
import shutil
import tarfile
import tempfile

from etils import epath

from t2i_jax.data import images, tar
from t2i_jax.data.bad import BadSample
from t2i_jax.errors import UserError

IMAGE, SYNTHETIC, ORIGINAL = "image.jpg", "synthetic_caption.txt", "original_caption.txt"
FIELDS = (IMAGE, SYNTHETIC)

_KEY = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff]{1,200}")


class ShardError(UserError):
    """A shard that does not hold what was written to it, or what it should."""


def is_key(text: str) -> bool:
    """Whether a sample may be called so: the name of a file, without a dot and without a folder."""
    return _KEY.fullmatch(text) is not None


class ShardWriter:
    """Writes a shard, local or remote, that has its name only when it is complete and checked.

        with ShardWriter("out/cc12m-train-0000.tar") as shard:
            shard.write("000000001", {IMAGE: jpeg, SYNTHETIC: caption})

    Until then it lies beside its place under another name (a remote one: in a temporary folder).
    Where the block ends with an exception, nothing is left. Every sample has exactly `fields`.
    """

    def __init__(self, path: str | os.PathLike, fields: tuple[str, ...] = FIELDS):
        self._path, self._fields = os.fspath(path), fields
        self._keys: set[str] = set()
        self._size: int | None = None
        folder, name = os.path.split(self._path)
        self._temporary = tempfile.mkdtemp() if tar.is_remote(self._path) else None
        self._partial = os.path.join(self._temporary or folder, f".{name}.partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, key: str, values: Mapping[str, bytes]) -> None:
        """Adds a sample. Raises ValueError for a key that is none or not new, or other fields."""
        if not is_key(key) or key in self._keys or set(values) != set(self._fields):
            raise ValueError(
                f"{self._path}: {key!r} with {sorted(values)}; keys are new and without a dot, "
                f"and the fields are {sorted(self._fields)}"
            )
        self._keys.add(key)
        for field in self._fields:
            header = tarfile.TarInfo(f"{key}.{field}")  # time 0, owner 0, mode 644
            header.size = len(values[field])
            self._tar.addfile(header, io.BytesIO(values[field]))

    def finish(self) -> int:
        """Ends and checks the shard, which gets its name with the block's end; its bytes."""
        if self._size is None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            check(self._partial, self._fields, len(self._keys))
            self._size = os.path.getsize(self._partial)
        return self._size

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.finish()
                if self._temporary:
                    epath.Path(self._partial).copy(self._path, overwrite=True)
                else:
                    os.replace(self._partial, self._path)
        finally:
            self._file.close()
            if self._temporary:
                shutil.rmtree(self._temporary, ignore_errors=True)
            elif os.path.exists(self._partial):
                os.unlink(self._partial)


def check(
    path: str | os.PathLike, fields: tuple[str, ...] = FIELDS, samples: int | None = None
) -> int:
    """Reads a whole shard; its number of samples, which must be `samples`. Raises ShardError.

    Every sample must have exactly `fields`, once and together; every image must decode whole, and
    every caption be UTF-8 that says something.
    """
    path = os.fspath(path)
    pool = tar.FilePool(1)
    keys: set[str] = set()
    current, missing = "", set()
    try:
        for member in tar.members(pool.open(path)):
            key, _, field = member.name.partition(".")
            if not is_key(key) or field not in fields:
                raise ValueError(f"{member.name!r} is not KEY.FIELD with one of {sorted(fields)}")
            if not missing:
                current, missing = key, set(fields)
                if key in keys:
                    raise ValueError(f"the key {key!r} comes twice")
                keys.add(key)
            if key != current or field not in missing:
                raise ValueError(f"{member.name!r} where {current!r} lacks {sorted(missing)}")
            missing.remove(field)
            _check_body(member.name, field, pool.read(path, member.offset, member.size))
        if missing:
            raise ValueError(f"{current!r} lacks {sorted(missing)}")
        if samples is not None and len(keys) != samples:
            raise ValueError(f"{len(keys)} samples, not {samples}")
    except ValueError as error:
        raise ShardError(f"{path}: {error}") from error
    return len(keys)


def _check_body(name: str, field: str, data: bytes) -> None:
    try:
        if field == IMAGE:
            images.open_image(data)
        elif not data.decode().strip():
            raise ValueError("an empty caption")
    except (BadSample, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
