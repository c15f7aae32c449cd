"""Captioned images as tf.train.Examples in ArrayRecord files, read where they lie.

The array_record library reads local files and Google Cloud Storage (gs://). It checks every record
against a hash; what it does not notice is a file that is cut after it was opened.
"""

import bisect
import collections
from collections.abc import Sequence
from concurrent import futures
import hashlib
import logging
import os
import re
import resource
import threading
from typing import Any, NamedTuple

from array_record.python import array_record_module
from etils import epath
import numpy as np

from t2i_jax.data import example, images, patterns, tar
from t2i_jax.data.bad import BadSample, Cause

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access: nothing is read ahead
_BUFFER = 1 << 15  # bytes of a file reader's buffer
_PEEKED = 8  # records whose features are looked at when the files are opened
_GROUP = re.compile(r"group_size:(\d+)")


class Span(NamedTuple):
    """Records first to first + count of a file."""

    path: str
    first: int
    count: int


def _open(path: str) -> array_record_module.ArrayRecordReader:
    """Never raises: a reader that is not `ok()` says why when it reads."""
    return array_record_module.ArrayRecordReader(
        path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
    )


class _Readers:
    """Open readers, which are safe to share: as many as half of the files a process may open."""

    def __init__(self):
        self._capacity = max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096) // 2)
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, record: int) -> bytes:
        """Raises BadSample where the record cannot be read, by a newly opened reader either."""
        try:
            return self._get(path).read([record])[0]
        except RuntimeError:
            with self._lock:
                self._readers.pop(path, None)
        try:
            return self._get(path).read([record])[0]
        except RuntimeError as error:
            raise BadSample(Cause.UNREADABLE, str(error)) from error

    def _get(self, path: str) -> Any:
        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
        reader = _open(path)  # without the lock: it reads the file's index
        with self._lock:
            reader = self._readers.setdefault(path, reader)
            while len(self._readers) > self._capacity:
                self._readers.popitem(last=False)  # closed when the last thread is done with it
        return reader


class Examples:
    """Captioned images in `spans` of ArrayRecord files of tf.train.Examples, in their order.

    `image_field` is a feature of one encoded image; `caption_field` may name several features, with
    commas, and each may have several values. A sample that lacks its image or all captions is a
    BadSample when it is read. Records are small, so every access reads the whole of one.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
    ):
        self._spans = [span for span in spans if span.count]
        self._starts = np.cumsum([0] + [span.count for span in self._spans]).tolist()
        self._image, self._original = image_field, original_caption_field
        self._captions = [name.strip() for name in caption_field.split(",")]
        self._readers = _Readers()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers=_Readers())

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fields(self) -> list[str]:
        """The features that are read."""
        return [name for name in (self._image, *self._captions, self._original) if name]

    @property
    def fingerprint(self) -> str:
        """Changes with the files' names and sizes, the records taken of them, and the fields."""
        digest = hashlib.blake2b(digest_size=16)
        for path, first, count in self._spans:
            size = epath.Path(path).stat().length if tar.is_remote(path) else os.stat(path).st_size
            digest.update(repr((os.path.basename(path), size, first, count)).encode())
        digest.update(repr((self._image, self._captions)).encode())
        return digest.hexdigest()

    def _locate(self, i: int) -> tuple[str, int]:
        """(file, record in it) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which = bisect.bisect_right(self._starts, i) - 1
        span = self._spans[which]
        return span.path, span.first + i - self._starts[which]

    def name(self, i: int) -> str:
        """'file:record', records counted from 0."""
        path, record = self._locate(i)
        return f"{os.path.basename(path)}:{record}"

    def features(self, i: int, names: Sequence[str] | None = None) -> dict[str, example.Values]:
        """The features of sample i, all or those of `names`."""
        data = self._readers.read(*self._locate(i))
        if not data:
            detail = "an empty record: it was written so, or the file was cut after it was opened"
            raise BadSample(Cause.UNREADABLE, detail)
        try:
            return example.decode(data, names)
        except ValueError as error:
            raise BadSample(Cause.UNREADABLE, str(error)) from error

    def _texts(self, features: dict[str, example.Values]) -> tuple[str, ...]:
        found = tuple(t for name in self._captions for t in _decoded(features, name))
        if not found:
            raise BadSample(Cause.MISSING_CAPTION, f"has no {', '.join(self._captions)}")
        return found

    def _encoded(self, features: dict[str, example.Values]) -> bytes:
        values = features.get(self._image, [])
        if len(values) != 1 or not isinstance(values[0], bytes) or not values[0]:
            what = f"{len(values)} values" if len(values) != 1 else f"a value {values[0]!r}"
            raise BadSample(Cause.MISSING_IMAGE, f"{self._image} has {what}, not one encoded image")
        return values[0]

    def caption(self, i: int) -> str:
        return self._texts(self.features(i, self._captions))[0]

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright image, from its header."""
        return images.upright_size(self._encoded(self.features(i, [self._image])))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The encoded image and its captions; what is wrong with it raises BadSample."""
        features = self.features(i, self.fields)
        captions, original = self.texts(features)
        image = self._encoded(features)
        return {"image": image, "captions": captions, "original_caption": original}

    def texts(self, features: dict[str, example.Values]) -> tuple[tuple[str, ...], str | None]:
        """(captions, original caption) of a sample. Raises BadSample where there is no caption."""
        captions = self._texts(features)
        original = _decoded(features, self._original)
        return captions, original[0] if original else None


def _decoded(features: dict[str, example.Values], name: str) -> list[str]:
    """The texts of a feature, none where it is absent. Raises BadSample."""
    try:
        return [value.decode("utf-8").strip() for value in features.get(name, [])]
    except (UnicodeDecodeError, AttributeError) as error:
        raise BadSample(Cause.BROKEN_CAPTION, f"{name} is not UTF-8 text: {error}") from error


class ArrayRecords(Examples):
    """All records of the ArrayRecord files that `pattern` names (patterns.py), in their order.

    Raises FileNotFoundError for a pattern without files; ValueError for a file that cannot be
    opened, and where the first records lack a field.
    """

    def __init__(
        self,
        pattern: str,
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
        num_threads: int = 16,
    ):
        refuse_remote(pattern)
        with futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
            spans = list(pool.map(whole, patterns.expand(pattern)))
        super().__init__(spans, image_field, caption_field, original_caption_field)
        if not len(self):
            raise ValueError(f"{pattern!r}: {len(spans)} ArrayRecord files without a record.")
        _warn_of_groups(self._spans[0].path)
        self._check(pattern)

    def _check(self, pattern: str) -> None:
        """A field that none of the first records has is a mistake in the config."""
        seen: dict[str, example.Values] = {}
        faults = []
        for i in range(min(_PEEKED, len(self))):
            try:
                seen = {**self.features(i), **seen}
            except BadSample as error:
                faults.append(f"{self.name(i)}: {error}")
        if not seen:
            raise ValueError(
                f"{pattern!r}: none of the first records is a tf.train.Example with features. "
                f"{faults[0] if faults else ''}"
            )
        absent = [name for name in self.fields if name not in seen]
        if absent:
            held = ", ".join(f"{name} ({_kind(seen[name])})" for name in sorted(seen)[:30])
            lacking = ", ".join(absent)
            raise ValueError(
                f"The records of {pattern!r} have no feature {lacking}; they hold {held}. "
                "Set --config.data.image_field, --config.data.caption_field (several with commas) "
                "and --config.data.original_caption_field to what is there."
            )


def refuse_remote(path: str) -> None:
    """Raises ValueError for a file system that the array_record library does not read."""
    schemes = {scheme.lower() for scheme in re.findall(r"(\w+)://", path)}
    if schemes - {"gs"}:
        raise ValueError(
            f"{path!r}: ArrayRecord files are read from local file systems and from gs://. Mount "
            "what holds them (as gcsfuse does for buckets), or copy them."
        )


def whole(path: str) -> Span:
    """All records of a file. Raises ValueError where it is not complete."""
    reader = _open(path)
    if not reader.ok():
        try:
            reader.read([0])
            reason = "it cannot be read"
        except RuntimeError as error:
            reason = str(error)
        raise ValueError(f"{path} is no whole ArrayRecord file: {reason}. Write or copy it again.")
    return Span(path, 0, reader.num_records())


def _warn_of_groups(path: str) -> None:
    group = _GROUP.search(_open(path).writer_options_string() or "")
    if group and int(group[1]) > 1:
        logging.warning(
            f"{path} has its records in groups of {group[1]}: each read decompresses a group. "
            "Written with group_size:1 it is faster to read at random."
        )


def _kind(values: example.Values) -> str:
    if not values:
        return "empty"
    kind = type(values[0]).__name__
    return kind if len(values) == 1 else f"{len(values)} x {kind}"
