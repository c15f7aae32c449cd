"""Captions by key, from published files that do not fit into memory.

Such a file becomes lines of JSON on a local disk (if it is that already, it is read in place) and
an index of them, two rows of 64-bit numbers: ranks, sorted, and the byte where the line begins.
A rank is a hash of the key; what is found under it counts only if its key is the very one, so that
collisions cost a second look and nothing else. Both stay in a cache, for the run after this one,
and the index is mapped, not read: the processes that look things up share one copy.
"""

import array
from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import typing

from etils import epath
import numpy as np

from t2i_jax.data import tar
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.prepare import archives
from t2i_jax.progress import Progress

_VERSION = 1
_LONGEST = 1 << 24  # bytes of a line
_USUAL = 1 << 12
_LOOKED_AT = 100  # lines that are searched for the caption's field before work begins
_GROUP_BITS = 16  # of a rank, where keys have groups
_LINES, _INDEX, _STATE = "lines.jsonl", "index.npy", "state.json"
_LINE_ENDINGS = (".jsonl", ".json", ".ndjson")


def _hash(key: str) -> int:
    """64 bits, the same everywhere and always."""
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Form:
    """What the lines of a file are.

    Attributes:
      field: of the caption; 'a.b' is field b of the object a.
      key: the key of a record, None where it has none.
      expected: what a record looks like, for messages.
      group: of a key, a number below 65536; keys of one group lie together in the index.
    """

    field: str
    key: Callable[[dict], str | None]
    expected: str
    group: Callable[[str], int] | None = None

    def rank(self, key: str) -> int:
        if self.group is None:
            return _hash(key)
        return self.group(key) << 64 - _GROUP_BITS | _hash(key) >> _GROUP_BITS

    def caption(self, record: dict) -> str:
        """Raises BadSample."""
        value: typing.Any = record
        for name in self.field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise BadSample(Cause.MISSING_CAPTION, f"its line has no {self.field!r}")
        if not isinstance(value, str):
            raise BadSample(Cause.BROKEN_CAPTION, f"{self.field!r} is {type(value).__name__}")
        return checked(value)


def checked(text: str) -> str:
    """The caption as it is. Raises BadSample where it says nothing, or cannot be UTF-8."""
    if not text.strip():
        raise BadSample(Cause.EMPTY_CAPTION, "an empty caption")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(Cause.BROKEN_CAPTION, f"not UTF-8: {error}") from error
    return text


def decoded(data: bytes) -> str:
    """The caption in a text file. Raises BadSample."""
    try:
        return checked(data.decode())
    except UnicodeDecodeError as error:
        raise BadSample(Cause.BROKEN_CAPTION, f"not UTF-8: {error}") from error


def _record(line: bytes, form: Form) -> tuple[str, dict] | None:
    """(key, record) of a line; None where it has no key, or is no JSON object."""
    try:
        record = json.loads(line)
        key = form.key(record) if isinstance(record, dict) else None
    except (ValueError, RecursionError):
        return None
    return None if key is None else (key, record)


class Lines:
    """Captions in a file of JSON lines. May be handed to another process."""

    def __init__(self, path: str, index: str, form: Form, identity: str):
        self._path, self._index, self._form = path, index, form
        self.identity = identity  # of the keys and where they lie

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_rows", "_file")}

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self._index, mmap_mode="r", allow_pickle=False)

    @functools.cached_property
    def _file(self):
        return tar.FilePool(1).open(self._path)

    def _read(self, offset: int) -> tuple[str, dict] | None:
        line = self._file.read(offset, _USUAL)
        while b"\n" not in line[-_USUAL:] and len(line) < _LONGEST:
            more = self._file.read(offset + len(line), _USUAL)
            if not more:
                break
            line += more
        return _record(line.partition(b"\n")[0], self._form)

    def get(self, key: str) -> str:
        """The caption; that of the first line with this key. Raises BadSample."""
        rank = np.uint64(self._form.rank(key))
        row = int(np.searchsorted(self._rows[0], rank))
        while row < self._rows.shape[1] and self._rows[0, row] == rank:
            found = self._read(int(self._rows[1, row]))
            if found is not None and found[0] == key:
                return self._form.caption(found[1])
            row += 1
        raise BadSample(Cause.MISSING_CAPTION, f"no line has the key {key!r}")

    def keys(self, group: int) -> list[str]:
        """The keys of a group, each once, in the order of the lines."""
        bounds = [np.uint64(g << 64 - _GROUP_BITS) for g in (group, group + 1)]
        first, last = np.searchsorted(self._rows[0], bounds)
        found = (self._read(int(offset)) for offset in np.sort(self._rows[1, first:last]))
        return list(dict.fromkeys(pair[0] for pair in found if pair is not None))


class Texts:
    """Captions in a folder: that of `key` is in key.txt. Raises ConfigError if there is none."""

    identity = ""

    def __init__(self, folder: str):
        self._folder = folder
        if not any(name.endswith(".txt") for name in archives.names(folder)):
            raise ConfigError(f"{folder} holds no .txt file; name the folder that directly does.")

    def get(self, key: str) -> str:
        """The caption. Raises BadSample."""
        if os.path.basename(key) != key:  # a name can never lead out of the folder
            raise BadSample(Cause.MISSING_CAPTION, f"{key!r} is not the name of a file")
        path = epath.Path(self._folder) / f"{key}.txt"
        try:
            return decoded(path.read_bytes())
        except FileNotFoundError as error:
            raise BadSample(Cause.MISSING_CAPTION, f"there is no {key}.txt") from error
        except OSError as error:
            raise BadSample(Cause.UNREADABLE, str(error)) from error


def open_lines(path: str, cache: str, form: Form) -> Lines:
    """Captions in a file of JSON lines, as it is, compressed (.gz), or in a tar file (.tgz).

    Raises MissingError, ConfigError, archives.Damaged.
    """
    _require(path)
    if archives.is_folder(path):
        raise ConfigError(f"{path} is a folder; wanted is a file of lines as {form.expected}.")
    in_place = not tar.is_remote(path) and not archives.is_compressed(path)
    copy = None if in_place and not archives.is_tar(path) else _copy_lines
    return _open(path, cache, form, copy)


def open_texts(path: str, cache: str) -> Lines | Texts:
    """Captions in one text file each: KEY.txt in a folder, or in a tar file, compressed or not.

    Raises MissingError, ConfigError, archives.Damaged.
    """
    _require(path)
    if archives.is_folder(path):
        return Texts(path)
    form = Form("caption", _key_of_text, "a tar file of .txt files")
    return _open(path, cache, form, _copy_texts)


def _require(path: str) -> None:
    if not epath.Path(path).exists():
        raise MissingError(f"There is no {path}; --captions names the published captions.")


def _key_of_text(record: dict) -> str | None:
    return record.get("key")


def _open(path: str, cache: str, form: Form, copy: Callable | None) -> Lines:
    folder = _folder(path, cache)
    lines = os.path.join(folder, _LINES) if copy else path
    index = os.path.join(folder, _INDEX)
    state = {"version": _VERSION, "source": path, "key": form.key.__qualname__}
    state["stamp"] = list(archives.stamp(path))
    stored = _stored(folder)
    if {k: stored.get(k) for k in state} != state or not os.path.exists(lines):
        for name in (_STATE, _INDEX, _LINES):
            if os.path.exists(os.path.join(folder, name)):
                os.unlink(os.path.join(folder, name))
        if copy:
            _write(lines, functools.partial(copy, path))
        stored = state | {"identity": _make_index(lines, index, form, path)}
        _write(os.path.join(folder, _STATE), lambda file: file.write(json.dumps(stored).encode()))
    opened = Lines(lines, index, form, stored["identity"])
    _check_field(opened, form, path)
    return opened


def _folder(path: str, cache: str) -> str:
    """The folder of a file in the cache."""
    name = os.path.basename(path)
    digest = hashlib.blake2b(os.path.abspath(path).encode(), digest_size=6).hexdigest()
    folder = os.path.join(cache, f"{name}-{digest}")
    os.makedirs(folder, exist_ok=True)
    return folder


def _stored(folder: str) -> dict:
    try:
        with open(os.path.join(folder, _STATE), "rb") as file:
            state = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    complete = isinstance(state, dict) and os.path.exists(os.path.join(folder, _INDEX))
    return state if complete else {}


def _write(path: str, fill: Callable[[typing.BinaryIO], typing.Any]) -> None:
    """A file that has its name only when it is complete."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            fill(file)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _check_field(lines: Lines, form: Form, path: str) -> None:
    """Refuses a field that none of the first lines has. Raises ConfigError."""
    names: dict[str, None] = {}
    for _, line in itertools.islice(_numbered(lines._path), _LOOKED_AT):
        pair = _record(line, form)
        if pair is None:
            continue
        names.update(dict.fromkeys(pair[1]))
        try:
            form.caption(pair[1])
            return
        except BadSample:
            continue
    raise ConfigError(
        f"The first {_LOOKED_AT} lines of {path} have no captions in {form.field!r}; they have "
        f"{sorted(names)}. Choose one as caption_field."
    )


def _numbered(path: str) -> Iterator[tuple[int, bytes]]:
    """(byte where it begins, line) of a file; longer lines than are read come in parts."""
    offset = 0
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST):
            yield offset, line
            offset += len(line)


def _progress(path: str, name: str) -> Progress:
    return Progress(archives.stamp(path)[0] // archives.CHUNK + 1, name=name, unit="MB")


def _make_index(path: str, index: str, form: Form, source: str) -> str:
    """Writes the index of a file; what identifies it. Raises ConfigError."""
    ranks, offsets = array.array("Q"), array.array("Q")
    bad, first_bad = 0, None
    with _progress(path, "indexing captions") as bar:
        for offset, line in _numbered(path):
            pair = _record(line, form)
            if pair is not None:
                ranks.append(form.rank(pair[0]))
                offsets.append(offset)
            elif line.strip():
                bad += 1
                first_bad = offset if first_bad is None else first_bad
            bar.update(offset // archives.CHUNK)
    if not ranks:
        raise ConfigError(f"No line of {source} is as wanted: {form.expected}.")
    if bad:
        logging.warning(
            f"{source}: {bad} lines are not as {form.expected}, the first at byte {first_bad}. "
            "If it is the last line, the file may be cut: download it again."
        )
    digest = hashlib.blake2b(digest_size=16)
    _write(index, functools.partial(_save_sorted, np.asarray(ranks), np.asarray(offsets), digest))
    return digest.hexdigest()


def _save_sorted(ranks: np.ndarray, offsets: np.ndarray, digest, file: typing.BinaryIO) -> None:
    """Both as a (2, n) .npy, by rank, equal ranks by offset; in parts, to need little memory."""
    header = {"descr": "<u8", "fortran_order": False, "shape": (2, len(ranks))}
    np.lib.format.write_array_header_1_0(file, header)
    parts = np.concatenate([(c >> 60).astype(np.uint8) for c in np.array_split(ranks, 64)])
    orders = []
    for part in range(16):
        where = np.flatnonzero(parts == part)
        order = where[np.argsort(ranks[where], kind="stable")]
        orders.append(order.astype(np.uint32 if len(ranks) < 1 << 32 else np.int64))
    for values, order in itertools.product((ranks, offsets), orders):
        data = values[order].astype("<u8").tobytes()
        digest.update(data)
        file.write(data)


def _copy_lines(path: str, out: typing.BinaryIO) -> None:
    """The lines of a compressed file, or of the one such file in a tar file."""
    with epath.Path(path).open("rb") as raw, _progress(path, "unpacking captions") as bar:
        if not archives.is_tar(path):
            for chunk in archives.plain_bytes(raw, path):
                out.write(chunk)
                bar.update(raw.tell() // archives.CHUNK)
            return
        names = []
        for entry in archives.entries(path, raw):
            if entry.ending not in _LINE_ENDINGS or entry.key.startswith("."):
                continue
            names.append(entry.name)
            if len(names) > 1:
                raise ConfigError(f"{path} holds {names}; unpack it and name one of them.")
            for chunk in entry.chunks():
                out.write(chunk)
                bar.update(raw.tell() // archives.CHUNK)
        if not names:
            raise ConfigError(f"{path} is a tar file without a .jsonl file.")


def _copy_texts(path: str, out: typing.BinaryIO) -> None:
    """Text files of a tar file as lines; one that is no text is a line without a caption."""
    with epath.Path(path).open("rb") as raw, _progress(path, "unpacking captions") as bar:
        for entry in archives.entries(path, raw):
            if entry.ending == ".txt":
                text = entry.read().decode("utf-8", "surrogateescape")
                out.write(json.dumps({"key": entry.key, "caption": text}).encode() + b"\n")
                bar.update(raw.tell() // archives.CHUNK)
