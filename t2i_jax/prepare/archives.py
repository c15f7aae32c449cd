"""Files as they were published: members of a tar file, compressed or not, or files of a folder.

Nothing is extracted: an entry's name is parsed and compared, and no path is ever made of it.
"""

from collections.abc import Callable, Iterator
import functools
import gzip
import os
import posixpath
import sys
import typing
import zlib

from etils import epath

from t2i_jax.data import tar
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.errors import UserError

CHUNK = 1 << 20
ARCHIVES = (".tar", ".tgz", ".tar.gz")

_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_GZIP = b"\x1f\x8b"
_BLOCK = 512


class Damaged(UserError):
    """A published file that cannot be read to its end."""


class Entry(typing.NamedTuple):
    """A file inside of an archive. `read(offset, size)` gives its bytes, all by default.

    Of a compressed archive only the entry that came last can be read, and that forwards.
    """

    name: str
    size: int
    read: Callable[..., bytes]

    @property
    def key(self) -> str:
        """The name without folders and ending."""
        return posixpath.splitext(posixpath.basename(self.name))[0]

    @property
    def ending(self) -> str:
        """As '.jpg'."""
        return posixpath.splitext(self.name)[1].lower()

    def chunks(self) -> Iterator[bytes]:
        for offset in range(0, self.size, CHUNK):
            yield self.read(offset, min(CHUNK, self.size - offset))


class _Forwards:
    """A compressed file read by position, as `tar.members` does, backwards at most one block."""

    window = _BLOCK  # no reading ahead: bodies are read, or passed over, after their header

    def __init__(self, file: typing.BinaryIO):
        self._file, self._at, self._block = file, 0, b""  # the last header, which ends at _at
        self.size = sys.maxsize  # until its end is seen

    def read(self, offset: int, size: int) -> bytes:
        back = self._at - offset
        if back > len(self._block):
            raise RuntimeError("a compressed archive is read forwards")
        head = self._block[-back:][:size] if back > 0 else b""
        while self._at < offset and self._take(min(offset - self._at, CHUNK)):
            pass
        data = head + self._take(size - len(head))
        self._block = data if size == _BLOCK else b""
        return data

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"its compression is damaged: {error}") from error
        self._at += len(data)
        if len(data) < size:
            self.size = self._at
        return data


def is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def is_folder(path: str) -> bool:
    return epath.Path(path).is_dir() if tar.is_remote(path) else os.path.isdir(path)


def stamp(path: str) -> tuple[int, int]:
    """(bytes, time of the last change): another file has others. Raises FileNotFoundError."""
    if tar.is_remote(path):
        status = epath.Path(path).stat()
        return status.length, int(status.mtime)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def is_compressed(path: str) -> bool:
    with epath.Path(path).open("rb") as file:
        return file.read(2) == _GZIP


def is_tar(path: str) -> bool:
    """Whether the file, compressed or not, begins like a tar file."""
    with epath.Path(path).open("rb") as file:
        stream = gzip.GzipFile(fileobj=file) if is_compressed(path) else file
        try:
            return stream.read(_BLOCK)[257:262] == b"ustar"
        except (EOFError, OSError, zlib.error):
            return False


def entries(path: str, file: typing.BinaryIO | None = None) -> Iterator[Entry]:
    """The files of an archive, in its order. Raises Damaged, also where it has no end mark.

    `file`: the archive, opened, where the caller wants to see how far it is read.
    """
    if file is None and not is_compressed(path):
        pool = tar.FilePool(1)
        body = functools.partial(_body, functools.partial(pool.read, path))
        yield from _entries(path, pool.open(path), body)
        return
    with file or epath.Path(path).open("rb") as raw:
        stream = _Forwards(gzip.GzipFile(fileobj=raw) if is_compressed(path) else raw)
        yield from _entries(path, stream, functools.partial(_body, stream.read))


def _entries(path: str, file, body: Callable[..., bytes]) -> Iterator[Entry]:
    try:
        for member in tar.members(file):
            read = functools.partial(body, path, member)
            yield Entry(member.name, member.size, read)
    except ValueError as error:
        raise Damaged(f"{path}: {error}. Download it again.") from error


def _body(
    read: Callable[[int, int], bytes],
    path: str,
    member: tar.Member,
    offset: int = 0,
    size: int | None = None,
) -> bytes:
    size = member.size - offset if size is None else size
    try:
        data = read(member.offset + offset, size)
    except ValueError as error:
        raise Damaged(f"{path}, {member.name!r}: {error} Download it again.") from error
    if len(data) != size:
        raise Damaged(f"{path}: it ends inside of {member.name!r}. Download it again.")
    return data


def folder_entry(folder: str, name: str) -> Entry:
    """A file of a folder that was listed. `read` raises BadSample."""

    def read(offset: int = 0, size: int | None = None) -> bytes:
        try:
            with (epath.Path(folder) / name).open("rb") as file:
                file.seek(offset)
                return file.read(-1 if size is None else size)
        except OSError as error:
            raise BadSample(Cause.UNREADABLE, str(error)) from error

    return Entry(name, 0, read)


def names(folder: str) -> Iterator[str]:
    """What is in a folder, in no order."""
    if tar.is_remote(folder):
        yield from (path.name for path in epath.Path(folder).iterdir())
    else:
        with os.scandir(folder) as found:
            yield from (entry.name for entry in found)


def images_of_folder(folder: str) -> list[str]:
    """The names of the images in a folder, sorted."""
    return sorted(name for name in names(folder) if is_image(name))


def images(path: str) -> Iterator[Entry]:
    """The images of an archive or a folder, in the order of the archive or of their names."""
    if is_folder(path):
        return (folder_entry(path, name) for name in images_of_folder(path))
    return (entry for entry in entries(path) if is_image(entry.name))


def plain_bytes(file: typing.BinaryIO, path: str) -> Iterator[bytes]:
    """The bytes of a file that is compressed, or not, in pieces. Raises Damaged."""
    stream = gzip.GzipFile(fileobj=file) if is_compressed(path) else file
    try:
        while chunk := stream.read(CHUNK):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(f"{path}: its compression is damaged: {error}. Download it again.") from error
