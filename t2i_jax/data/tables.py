"""Captions files: rows of JSON lines, CSV or Parquet, each read when it is asked for.

Of JSON lines and CSV the byte offsets of the rows are kept, eight bytes a row. Parquet is not made
for reading single rows: its columns are decoded once and kept in Arrow's layout.
"""

import array
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import csv
import hashlib
import io
import json
import os
from typing import Any, BinaryIO

from etils import epath
import numpy as np

from t2i_jax.data import shared, tar
from t2i_jax.data.bad import BadSample, Cause

KINDS = ("jsonl", "csv", "parquet")
_MAX_ROW = 1 << 24  # bytes of a row; a longer one is not read
_CHUNK = 1 << 24  # bytes read at a time to find the rows
_PEEKED = 100  # rows of JSON whose keys are the file's columns


def open_table(path: str, wanted: Sequence[str]) -> "Table":
    """The rows of a captions file, of which the columns `wanted` are read. Raises ValueError."""
    kind = path.rpartition(".")[2].lower()
    table = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet}[kind](path, wanted)
    if not len(table):
        raise ValueError(f"{path} has no rows.")
    return table


class Table:
    """The rows of one captions file. Reading is safe from several threads.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: str):
        self.path = path

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, i: int) -> Mapping[str, Any]:
        """Column -> value; BadSample where the row cannot be read."""
        raise NotImplementedError

    def number(self, i: int) -> int:
        """Of the row in the file, for people."""
        raise NotImplementedError

    def digest(self) -> bytes:
        """Of the file's name, and of what is where in it, not of contents."""
        raise NotImplementedError


def _require(path: str, columns: Sequence[str], wanted: Sequence[str]) -> None:
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, absent))}; it has "
            f"{', '.join(map(repr, list(columns)[:30]))}. Set --config.data.image_field (the paths "
            "of the images), --config.data.caption_field (several with commas) and "
            "--config.data.original_caption_field to what is there."
        )


def _open(path: str) -> BinaryIO:
    return epath.Path(path).open("rb") if tar.is_remote(path) else open(path, "rb")


class _Rows(Table):
    """Rows that lie one after the other in a text file: row i from _starts[i] to _starts[i + 1].

    Lines are counted from 1, as editors do.
    """

    _starts: np.ndarray  # (rows + 1,) int64
    _lines: np.ndarray | range  # (rows,)

    def __init__(self, path: str):
        super().__init__(path)
        self._pool = tar.FilePool()

    def _keep(self, starts: np.ndarray, lines: np.ndarray) -> None:
        self._starts = starts
        whole = len(lines) == 0 or lines[-1] - lines[0] == len(lines) - 1
        first = int(lines[0]) if len(lines) else 1
        self._lines = range(first, first + len(lines)) if whole else lines

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_pool": None, "_starts": shared.pack(self._starts)}
        if isinstance(self._lines, np.ndarray):
            state["_lines"] = shared.pack(self._lines)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: shared.unpack(state[name]) for name in ("_starts", "_lines")}
        self.__dict__.update(state, **arrays, _pool=tar.FilePool())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def number(self, i: int) -> int:
        return int(self._lines[i])

    def digest(self) -> bytes:
        key = os.path.basename(self.path).encode()[:64]
        return hashlib.blake2b(self._starts, digest_size=16, key=key).digest()

    def _text(self, i: int) -> str:
        start, stop = int(self._starts[i]), int(self._starts[i + 1])
        if stop - start > _MAX_ROW:
            raise BadSample(Cause.BROKEN_CAPTION, f"a row of {stop - start} bytes")
        try:
            return self._pool.read(self.path, start, stop - start).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(Cause.BROKEN_CAPTION, f"not UTF-8: {error}") from error


class JsonLines(_Rows):
    """A JSON object a line; lines of nothing are passed over."""

    def __init__(self, path: str, wanted: Sequence[str]):
        super().__init__(path)
        with _open(path) as file:
            self._keep(*_find_lines(file))
        columns: dict[str, None] = {}
        faults = []
        for i in range(min(_PEEKED, len(self))):
            try:
                columns.update(dict.fromkeys(self.row(i)))
            except BadSample as error:
                faults.append(f"line {self.number(i)}: {error}")
        if faults and not columns:
            raise ValueError(f"{path}: none of its first rows is a JSON object; {faults[0]}")
        if len(self):
            _require(path, list(columns), wanted)

    def row(self, i: int) -> Mapping[str, Any]:
        text = self._text(i)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(Cause.BROKEN_CAPTION, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadSample(Cause.BROKEN_CAPTION, f"not a JSON object but a {type(row).__name__}")
        return row


def _find_lines(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines that are not empty start, and where the file ends; and their numbers."""
    starts, lines = [], []
    begin = offset = count = 0  # of the line that is being read; of the chunk; lines before it
    last = 0
    while chunk := file.read(_CHUNK):
        bytes_ = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(bytes_ == ord("\n"))
        if len(ends):
            before = np.where(ends > 0, bytes_[ends - 1], last)
            found = np.concatenate([[begin - offset], ends[:-1] + 1])
            length = ends - found
            kept = (length > 1) | ((length == 1) & (before != ord("\r")))
            starts.append(found[kept] + offset)
            lines.append(np.flatnonzero(kept) + count + 1)
            begin, count = offset + int(ends[-1]) + 1, count + len(ends)
        offset, last = offset + len(chunk), bytes_[-1]
    tail = [begin] if begin < offset else []  # a last line without an end
    return (
        np.concatenate([*starts, np.array([*tail, offset])]).astype(np.int64),
        np.concatenate([*lines, np.array([count + 1] * len(tail))]).astype(np.int64),
    )


class Csv(_Rows):
    """Comma-separated values with a line of names, as Python's csv module reads them.

    Quoted values may have newlines. Raises ValueError where a quote swallows the rest of the file.
    """

    def __init__(self, path: str, wanted: Sequence[str]):
        super().__init__(path)
        with _open(path) as file:
            starts, lines = _find_records(path, file)
        self._keep(starts, lines)
        if not len(self):
            raise ValueError(f"{path} is empty; its first line must have the names of columns.")
        self._columns = self._values(0)
        self._keep(starts[1:], lines[1:])
        _require(path, self._columns, wanted)
        if len(self):
            self._check_end()

    def _check_end(self) -> None:
        """The csv module takes an open quote for closed where the file ends."""
        with contextlib.suppress(BadSample):
            text = self._text(len(self) - 1).rstrip("\r\n")
            if len(list(csv.reader(io.StringIO(f"{text}\nx", newline="\n")))) == 1:
                raise ValueError(
                    f"{self.path}, line {self.number(len(self) - 1)}: a quote is opened and not "
                    "closed to the end of the file. Quotes inside of values are doubled."
                )

    def _values(self, i: int) -> list[str]:
        text = self._text(i)
        try:
            return next(csv.reader(io.StringIO(text, newline="\n")), [])
        except csv.Error as error:
            raise BadSample(Cause.BROKEN_CAPTION, f"not CSV: {error}") from error

    def row(self, i: int) -> Mapping[str, str]:
        values = self._values(i)
        if len(values) > len(self._columns):
            raise BadSample(
                Cause.BROKEN_CAPTION,
                f"{len(values)} values for {len(self._columns)} columns: one with a comma is not "
                "quoted",
            )
        return dict(zip(self._columns, values, strict=False))  # fewer: the last ones are absent


def _find_records(path: str, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Where the records that are not empty start, and the file ends; and the lines they start in.

    The csv module takes exactly the lines of a record to make it. Latin-1 leaves every byte what it
    is, and commas, quotes and newlines are no part of other characters in UTF-8.
    """
    offset = 0

    def read_lines() -> Iterator[str]:
        nonlocal offset
        for line in file:
            offset += len(line)
            yield line.decode("latin-1")

    starts, lines = array.array("q"), array.array("q")
    reader = csv.reader(read_lines())
    while True:
        start, line = offset, reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: {error}. Either a quote is never closed, or a value is of "
                f"more than {csv.field_size_limit()} bytes, or has a line end and no quotes."
            ) from error
        if record is None:
            break
        if record:
            starts.append(start)
            lines.append(line)
    starts.append(offset)
    return np.array(starts, np.int64), np.array(lines, np.int64)


class Parquet(Table):
    """The wanted columns of a Parquet file: strings, or lists of strings. Rows count from 0."""

    def __init__(self, path: str, wanted: Sequence[str]):
        super().__init__(path)
        pa = _pyarrow()
        from pyarrow import parquet

        place = epath.Path(path).open("rb") if tar.is_remote(path) else path
        sink = pa.BufferOutputStream()
        try:
            with parquet.ParquetFile(place, memory_map=True) as file:
                narrow = self._narrow(file.schema_arrow, wanted)
                with pa.ipc.new_file(sink, narrow) as writer:
                    for batch in file.iter_batches(columns=narrow.names):
                        writer.write_batch(batch.select(narrow.names).cast(narrow))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no whole Parquet file: {error}") from error
        self._data = np.frombuffer(sink.getvalue(), np.uint8)
        self._read()

    def _narrow(self, schema: Any, wanted: Sequence[str]) -> Any:
        """The schema of what is kept. Raises ValueError where it is not text."""
        pa = _pyarrow()
        _require(self.path, schema.names, wanted)
        fields = []
        for name in dict.fromkeys(wanted):
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            item = kind.value_type if pa.types.is_list(kind) and name != wanted[0] else kind
            if not (pa.types.is_string(item) or pa.types.is_large_string(item)):
                raise ValueError(
                    f"{self.path}: the column {name!r} is of {kind}; images are read from paths in "
                    "a column of strings, captions from strings or lists of them. (Pictures inside "
                    "of Parquet files are not read: write them as ArrayRecord or WebDataset.)"
                )
            fields.append(pa.field(name, kind))
        return pa.schema(fields)

    def _read(self) -> None:
        pa = _pyarrow()
        self._table = pa.ipc.open_file(pa.py_buffer(self._data)).read_all()  # refers to the buffer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None, "_data": shared.pack(self._data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _data=shared.unpack(state["_data"]))
        self._read()

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, i: int) -> Mapping[str, Any]:
        try:
            return {name: self._table[name][i].as_py() for name in self._table.column_names}
        except UnicodeDecodeError as error:
            raise BadSample(Cause.BROKEN_CAPTION, f"not UTF-8: {error}") from error

    def number(self, i: int) -> int:
        return i

    def digest(self) -> bytes:
        size = epath.Path(self.path).stat().length
        return f"{size} {os.path.basename(self.path)}".encode()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: pip install pyarrow, or pip install -e '.[parquet]'"
        ) from error
    return pyarrow
