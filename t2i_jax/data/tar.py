"""Random access to tar archives, in place.

`members` walks the headers of an archive and seeks over the bodies; `FilePool` then reads bodies
through a bounded number of open files, from any thread. Nothing is extracted.

Header layout: POSIX.1-2017, "ustar Interchange Format" and "pax Interchange Format", and the GNU
tar manual, "Basic Tar Format".
"""

import collections
from collections.abc import Iterator
import os
import re
import threading
import typing
import zlib

from etils import epath

_BLOCK = 512
_MAX_NAME_RECORD = 1 << 20  # bytes of a long name or a pax header; real ones are under a kilobyte
_PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")
_REGULAR, _BODILESS = b"0\x007", b"123456"  # '1'..'6': links, devices, directories, FIFOs


class Member(typing.NamedTuple):
    """A regular file inside an archive: where its body lies, in bytes."""

    name: str
    offset: int
    size: int


class _LocalFile:
    """A file read by position. Its descriptor lives as long as somebody refers to the object."""

    window = 4096  # bytes read for a header: small bodies and the next headers come along

    def __init__(self, path: str):
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def __del__(self, close=os.close):  # bound now: modules are gone when the interpreter ends
        if hasattr(self, "_fd"):
            close(self._fd)


class _RemoteFile:
    """The same through epath's file objects, which have one position: reads take turns."""

    window = 1 << 16

    def __init__(self, path: str):
        self._lock = threading.Lock()
        self._file = epath.Path(path).open("rb")
        self.size = self._file.seek(0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


def is_remote(path: str) -> bool:
    return "://" in path


class FilePool:
    """Keeps the `capacity` most recently used files open; safe to share between threads."""

    def __init__(self, capacity: int = 64):
        self._capacity = capacity
        self._files: collections.OrderedDict[str, _LocalFile | _RemoteFile] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def open(self, path: str) -> _LocalFile | _RemoteFile:
        """An open file. One that falls out of the pool stays open for those who still read it."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        file = _RemoteFile(path) if is_remote(path) else _LocalFile(path)
        with self._lock:
            file = self._files.setdefault(path, file)
            self._files.move_to_end(path)
            while len(self._files) > self._capacity:
                self._files.popitem(last=False)
        return file

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; ValueError where the file has become shorter than its index."""
        data = self.open(path).read(offset, size)
        if len(data) != size:
            raise ValueError(
                f"{path}: {size} bytes expected at byte {offset}, the file holds {len(data)}. "
                "It changed after it was indexed; start again once it is complete."
            )
        return data


def _number(field: bytes) -> int:
    """A numeric field: octal digits, or GNU's base 256 for what does not fit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError(f"{field!r} is not a number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _check_sum(block: bytes) -> None:
    stored = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]  # the field itself counts as spaces
    # Adler-32's low half is 1 + the sum of the bytes, modulo 65521, and 20 times faster than sum().
    if zlib.adler32(rest) & 0xFFFF == (stored + 1) % 65521:
        return
    signed = sum(rest) - 256 * sum(byte >= 128 for byte in rest)  # what some old writers store
    if stored != signed:
        raise ValueError("the checksum of the header does not match")


def _pax_records(data: bytes) -> dict[str, str]:
    """'<length> <key>=<value>\\n' records, the length counting the whole record."""
    records, start = {}, 0
    while start < len(data) and data[start]:
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a pax record is malformed")
        key = match[2].decode("utf-8", "surrogateescape")
        records[key] = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        start = end
    return records


class _Window:
    """Reads of a few blocks at rising offsets, several from one system call."""

    def __init__(self, file):
        self._file, self._start, self._data = file, 0, b""

    def get(self, offset: int, size: int) -> bytes:
        begin = offset - self._start
        if not 0 <= begin <= len(self._data) - size:
            self._data = self._file.read(offset, max(size, self._file.window))
            self._start, begin = offset, 0
        data = self._data[begin : begin + size]
        if len(data) < size:
            raise ValueError("the file ends inside of a member")
        return data


def members(file) -> Iterator[Member]:
    """The regular files of an archive in their order; `file` comes from `FilePool.open`.

    Links, devices, directories and sparse files are passed over. Raises ValueError, naming the
    byte offset of the member, where the archive is damaged.
    """
    window, offset = _Window(file), 0
    shared: dict[str, str] = {}  # of 'g' headers: for all that follow
    own: dict[str, str] = {}  # of 'L' and 'x' headers: for the next member
    while offset < file.size or offset == 0:
        try:
            block = window.get(offset, _BLOCK)
            if not block[0] and not block.strip(b"\0"):
                return
            _check_sum(block)
            kind, size = block[156:157], _number(block[124:136])
            body = offset + _BLOCK
            if kind in b"LKxgX":
                if size > _MAX_NAME_RECORD:
                    raise ValueError(f"a name record of {size} bytes")
                _keep_record(kind, window.get(body, size), own, shared)
                offset = body + _blocks(size)
                continue
            records, own = {**shared, **own}, {}
            size = int(records.get("size", size))
            if kind == b"S":
                body = _after_sparse_map(window, block, body)
            end = body if kind in _BODILESS else body + size
            if not body <= end <= file.size:
                raise ValueError(f"its body of {size} bytes reaches over the end of the file")
        except ValueError as error:
            raise ValueError(f"damaged at byte {offset}: {error}") from error
        name = records.get("path") or _header_name(block)
        sparse = any(key.startswith("GNU.sparse.") for key in records)
        if kind in _REGULAR and not name.endswith("/") and not sparse:
            yield Member(name, body, size)
        offset = body + _blocks(end - body)


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _keep_record(kind: bytes, data: bytes, own: dict[str, str], shared: dict[str, str]) -> None:
    if kind == b"L":
        own["path"] = _text(data)
    elif kind == b"g":
        shared.update(_pax_records(data))
    elif kind in b"xX":
        own.update(_pax_records(data))


def _header_name(block: bytes) -> str:
    name, prefix = _text(block[:100]), b""
    if block[257:263] == b"ustar\0":  # GNU's magic is b'ustar ', and puts other things there
        prefix = block[345:500]
    return f"{_text(prefix)}/{name}" if prefix.strip(b"\0") else name


def _after_sparse_map(window: _Window, block: bytes, body: int) -> int:
    """Where the body of an old GNU sparse member begins: after the blocks that continue its map."""
    more = block[482]
    while more:
        more = window.get(body, _BLOCK)[504]
        body += _BLOCK
    return body
