"""WebDataset shards (tar files) as a random-access source, read where they lie.

A sample is the members of one shard that share a *key*, the name up to the first dot after the last
slash; the rest of the name is the *field*: `000017.image.jpg` is field `image.jpg` of key `000017`.
Opening reads the headers of all shards; only the configured fields are ever read after that.
"""

import bisect
from concurrent import futures
import functools
import glob
import logging
import os
import re

from etils import epath
import numpy as np

from t2i_jax.data import tar

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_GZIP = b"\x1f\x8b"


def expand_braces(pattern: str) -> list[str]:
    """'a-{08..10}' -> a-08, a-09, a-10; '{x,y}' -> x, y; braces with neither stay as they are."""
    for match in _BRACES.finditer(pattern):
        bounds = _RANGE.fullmatch(match[1])
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            options = [str(i).zfill(width) for i in range(first, last + 1)]
        elif "," in match[1]:
            options = match[1].split(",")
        else:
            continue
        head, tail = pattern[: match.start()], pattern[match.end() :]
        return [path for option in options for path in expand_braces(head + option + tail)]
    return [pattern]


def _glob(pattern: str) -> list[str]:
    """The files that a pattern with wildcards names, unsorted."""
    if not tar.is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return [os.fspath(p) for p in epath.Path("/".join(parts[:first])).glob("/".join(parts[first:]))]


def _is_file(path: str) -> bool:
    return epath.Path(path).exists() if tar.is_remote(path) else os.path.isfile(path)


def expand(pattern: str) -> list[str]:
    """The shards that `pattern` names, sorted, each once.

    A pattern is a '::'-separated list of paths with braces ('{0000..2175}', '{a,b}') and wildcards.
    Raises FileNotFoundError if it names no file, or if a spelled-out one is missing.
    """
    shards, missing = set(), []
    for path in (path for part in pattern.split("::") for path in expand_braces(part.strip())):
        found = [path] if _is_file(path) else _glob(path) if glob.has_magic(path) else []
        shards.update(found)
        if not found:
            missing.append(path)
    if missing:
        where = "" if tar.is_remote(pattern) else f", looked for in {os.getcwd()}"
        raise FileNotFoundError(
            f"No file matches {missing[0]!r} (and {len(missing) - 1} more; {len(shards)} shards "
            f"were found) of data.path {pattern!r}{where}. Expected are WebDataset shards, tar "
            "files as 'data/cc12m-train-{0000..2175}.tar', a glob, or several joined by '::'; "
            "download them, narrow the pattern to those that are there, or name others: "
            "--config.data.path='DIR/*.tar'."
        )
    return sorted(shards)


class _ShardIndex:
    """Where the samples of one shard lie: keys (n,), offsets and sizes (n, fields); -1 = absent."""

    def __init__(self, pool: tar.FilePool, path: str, fields: tuple[str, ...], required: int):
        file = pool.open(path)
        if file.read(0, 2) == _GZIP:
            raise ValueError(f"{path} is compressed; samples are read in place: gunzip it first.")
        column = {field.lower(): i for i, field in enumerate(fields) if field}
        self.seen: set[str] = set()
        found: dict[str, list[tuple[int, int]]] = {}
        try:
            for member in tar.members(file):
                match = _NAME.fullmatch(member.name)
                if match is None:
                    continue
                field = match[2].lower()
                self.seen.add(field)
                if field in column:
                    row = found.setdefault(match[1], [(-1, -1)] * len(fields))
                    row[column[field]] = (member.offset, member.size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Download or write that shard again.") from error
        kept = {k: row for k, row in found.items() if all(at >= 0 for at, _ in row[:required])}
        self.dropped = [key for key in found if key not in kept]
        spans = np.array(list(kept.values()), np.int64).reshape(len(kept), len(fields), 2)
        self.offsets, self.sizes = np.ascontiguousarray(spans[..., 0]), spans[..., 1].copy()
        self.keys = np.array([os.fsencode(key) for key in kept], np.bytes_)


class WebDataset:
    """Captioned images in WebDataset shards: `self[i]` reads sample i, in the order of the shards.

    `image_field` and `caption_field` are what a sample must have: one that lacks either is left
    out, counted and reported. `original_caption_field` may be absent from a sample ('' = not read).
    Raises FileNotFoundError for a pattern without files, ValueError for a damaged shard.
    """

    def __init__(
        self,
        pattern: str,
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
        num_threads: int = 16,
    ):
        self._shards = expand(pattern)
        self._pool = tar.FilePool()
        fields = (image_field, caption_field, original_caption_field)
        index = functools.partial(_ShardIndex, self._pool, fields=fields, required=2)
        with futures.ThreadPoolExecutor(max(1, num_threads)) as executor:
            self._index = list(executor.map(index, self._shards))
        self._starts = np.cumsum([0] + [len(shard.keys) for shard in self._index]).tolist()
        self._report(pattern, fields)

    def _report(self, pattern: str, fields: tuple[str, ...]) -> None:
        seen = sorted(set().union(*(shard.seen for shard in self._index)))
        absent = [field for field in fields if field and field.lower() not in seen]
        if absent or not len(self):
            raise ValueError(
                f"No sample of {pattern!r} has {' and '.join(map(repr, absent or fields[:2]))}; "
                f"the shards hold the fields {seen[:20]}. Set data.image_field, data.caption_field "
                "and data.original_caption_field to what is there."
            )
        dropped = [
            f"{os.path.basename(path)}/{key}"
            for path, shard in zip(self._shards, self._index, strict=True)
            for key in shard.dropped
        ]
        if dropped:
            logging.warning(
                f"{pattern}: {len(dropped)} of {len(dropped) + len(self)} samples are left out: "
                f"they lack {fields[0]} or {fields[1]}. The first: {', '.join(dropped[:5])}"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, i: int) -> tuple[int, int]:
        """(shard, row) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _read(self, shard: int, row: int, column: int) -> bytes | None:
        offset = int(self._index[shard].offsets[row, column])
        if offset < 0:
            return None
        return self._pool.read(
            self._shards[shard], offset, int(self._index[shard].sizes[row, column])
        )

    def _text(self, shard: int, row: int, column: int) -> str | None:
        data = self._read(shard, row, column)
        return None if data is None else data.decode("utf-8", "replace").strip()

    def __getitem__(self, i: int) -> dict[str, bytes | str | None]:
        """The encoded image, its captions and its key, 'shard/key'."""
        shard, row = self._locate(i)
        key = os.fsdecode(bytes(self._index[shard].keys[row]))
        return {
            "image": self._read(shard, row, 0),
            "caption": self._text(shard, row, 1),
            "original_caption": self._text(shard, row, 2),
            "key": f"{os.path.basename(self._shards[shard])}/{key}",
        }

    def caption(self, i: int) -> str:
        return self._text(*self._locate(i), 1)
