"""Random access to tar archives, in place.

`members` walks the headers of an archive and seeks over the bodies; `FilePool` then reads bodies
through a bounded number of open files, from any thread. Nothing is extracted.

Header layout: POSIX.1-2017, "ustar Interchange Format" and "pax Interchange Format", and the GNU
tar manual, "Basic Tar Format".
"""

import collections
from collections.abc import Callable, Iterator
import os
import re
import threading
import time
import typing
import zlib

import fsspec

from t2i_jax.data.bad import BadSample, Cause

_BLOCK = 512
_MAX_NAME_RECORD = 1 << 20  # bytes of a long name or a pax header; real ones are under a kilobyte
_MAX_NAME = 1 << 12  # characters: the longest path of Linux; one key is not to fill the memory
_MAX_DAMAGES = 1000  # of one file; after them it is given up
_MARK = 1024  # zeros that end an archive; more of them fill its last record
_RECORDS = (10240, *(_BLOCK << k for k in range(5, 15)))  # bytes: tar's own, and larger ones
_PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")
_REGULAR, _BODILESS = b"0\x007", b"123456"  # '1'..'6': links, devices, directories, FIFOs
_KINDS = _REGULAR + _BODILESS + b"LKxgXS"
_MAGIC, _MAGIC_AT = b"ustar", 257
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a read that failed is tried again
_SCAN = 1 << 20  # bytes looked through at once for the next header


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
    """The same of a file elsewhere: each read is one request of exactly these bytes."""

    window = 1 << 16

    def __init__(self, path: str):
        self._system, self._path = fsspec.core.url_to_fs(path)
        self.size = self._system.size(self._path)

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        return self._system.cat_file(self._path, start=offset, end=end) if end > offset else b""


def is_remote(path: str) -> bool:
    return "://" in path


class FilePool:
    """Keeps about `capacity` most recently used files open; safe to share between threads.

    Remote ones hold nothing open, and are all kept.
    """

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
            while not is_remote(path) and len(self._files) > self._capacity:
                self._files.popitem(last=False)
        return file

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises BadSample where the file is shorter than its index says.

        What fails for another reason (a network) is tried again for some seconds.
        """
        for pause in (*_PAUSES, None):
            try:
                data = self.open(path).read(offset, size)
                break
            except OSError:
                with self._lock:
                    self._files.pop(path, None)
                if pause is None:
                    raise
                time.sleep(pause)
        if len(data) != size:
            raise BadSample(
                Cause.UNREADABLE,
                f"{path}: {size} bytes expected at byte {offset}, the file holds {len(data)}. "
                "It changed after it was indexed.",
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


class Damage(typing.NamedTuple):
    """Bytes `start` to `stop` of an archive, of which no member can be told."""

    start: int
    stop: int
    reason: str


def members(file, on_damage: Callable[[Damage], None] | None = None) -> Iterator[Member]:
    """The regular files of an archive in their order; `file` comes from `FilePool.open`.

    Links, devices, directories and sparse files are passed over. Where the archive is damaged,
    raises ValueError that names the byte; or, with `on_damage`, tells it and goes on at the next
    header that is whole. An archive without its end mark is damaged: it was cut.
    """
    walk, damages = _Walk(file), 0
    while not walk.ended:
        try:
            member = walk.step()
        except ValueError as error:
            start = min(walk.offset, file.size)  # where a body's last block is cut, it is over it
            if on_damage is None:
                raise ValueError(f"damaged at byte {start}: {error}") from error
            walk.recover(damages >= _MAX_DAMAGES)
            damages += 1
            on_damage(Damage(start, walk.offset, str(error)))
        else:
            if member is not None:
                yield member


class _Walk:
    """Goes over the headers of an archive; `offset` is that of the next one."""

    def __init__(self, file):
        self._file, self._window, self.offset, self.ended = file, _Window(file), 0, False
        self._shared: dict[str, str] = {}  # of 'g' headers: for all that follow
        self._own: dict[str, str] = {}  # of 'L' and 'x' headers: for the next member

    def step(self) -> Member | None:
        """Reads one header: the member, None if it is no regular file. Raises ValueError."""
        if self.offset >= self._file.size:
            raise ValueError("the archive has no end mark: it was cut, or is not finished")
        block = self._window.get(self.offset, _BLOCK)
        if not block[0] and not block.strip(b"\0"):
            return self._end()
        _check_sum(block)
        kind, size = block[156:157], _number(block[124:136])
        body = self.offset + _BLOCK
        if kind in b"LKxgX":
            if size > _MAX_NAME_RECORD:
                raise ValueError(f"a name record of {size} bytes")
            self._keep_record(kind, self._window.get(body, size))
            self.offset = body + _blocks(size)
            return None
        records = {**self._shared, **self._own}
        size = int(records.get("size", size))
        if kind == b"S":
            body = _after_sparse_map(self._window, block, body)
        end = body if kind in _BODILESS else body + size
        if not body <= end <= self._file.size:
            raise ValueError(f"its body of {size} bytes reaches over the end of the file")
        name = records.get("path") or _header_name(block)
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name of {len(name)} characters")
        self._own = {}
        self.offset = body + _blocks(end - body)
        sparse = any(key.startswith("GNU.sparse.") for key in records)
        regular = kind in _REGULAR and not name.endswith("/") and not sparse
        return Member(name, body, size) if regular else None

    def recover(self, give_up: bool) -> None:
        """Goes to the next header that is whole after this offset, or to the end of the file."""
        self._own = {}
        start = self._file.size if give_up else self.offset + _BLOCK
        while start < self._file.size:
            chunk = self._file.read(start, _SCAN + _BLOCK)
            at = chunk.find(_MAGIC)
            while 0 <= at < _SCAN + _MAGIC_AT:
                header, rest = divmod(at - _MAGIC_AT, _BLOCK)
                header *= _BLOCK
                if rest == 0 and header >= 0 and _is_header(chunk[header : header + _BLOCK]):
                    self.offset = start + header
                    return
                at = chunk.find(_MAGIC, at + 1)
            start += _SCAN
        self.offset, self.ended = self._file.size, True

    def _end(self) -> None:
        """A block of zeros: the end, if nothing else follows."""
        start = self.offset
        while start < self._file.size:
            chunk = self._file.read(start, _SCAN)
            if chunk.strip(b"\0"):
                raise ValueError("zeros before the end: a header is lost, or archives were joined")
            start += len(chunk) or _SCAN
        self.ended = True
        zeros = self._file.size - self.offset
        fills = (size for size in _RECORDS if self._file.size % size == 0)
        if zeros > _MARK + max(fills, default=_RECORDS[0]):
            raise ValueError(f"{zeros} zeros at the end: where something was, if it was cut")
        if self._file.size % _BLOCK:
            raise ValueError("it does not end with a whole block: bytes are lost, or were added")

    def _keep_record(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self._own["path"] = _text(data)
        elif kind == b"g":
            self._shared.update(_pax_records(data))
        elif kind in b"xX":
            self._own.update(_pax_records(data))


def _is_header(block: bytes) -> bool:
    try:
        _check_sum(block)
        return len(block) == _BLOCK and block[156:157] in _KINDS
    except ValueError:
        return False


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


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
