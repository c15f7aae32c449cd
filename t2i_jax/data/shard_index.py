"""Where the samples of a WebDataset shard lie: its headers are read once, and the index kept.

A sample is the members of one shard that share a *key*, the name up to the first dot after the last
slash; the rest of the name is the *field*: `000017.image.jpg` is field `image.jpg` of key `000017`.
An index holds all fields of all samples, so that it serves any config. It is a NumPy archive beside
the shard, or in a directory of indexes, and is made anew where the shard's size or time differ.
"""

from collections.abc import Sequence
from concurrent import futures
import functools
import hashlib
import io
import os
from pathlib import Path
import re
import typing
import uuid

from etils import epath
import numpy as np

from t2i_jax.data import tar
from t2i_jax.progress import Progress

SUFFIX = ".index.npz"
KINDS = ("jpg", "jpeg", "png", "webp", "txt", "json")  # members of other kinds are never read
ABSENT = 2**32 - 1  # of `blocks`: the sample lacks the field
BLOCK = 512  # bodies start at multiples of it

_VERSION = 1
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_MAX_FIELDS = 256
_GZIP = b"\x1f\x8b"
_MANY = 16  # shards to be indexed from which on progress is shown


class ShardIndex(typing.NamedTuple):
    """The samples of a shard, in its order.

    Attributes:
      fields: of all samples, lower case.
      keys: (n,) bytes.
      blocks: (n, fields) uint32: where a body starts, in blocks of 512 bytes; ABSENT = no member.
      sizes: (n, fields) uint32, bytes.
      ignored: members of kinds that are not read, or without a key.
      damage: what of the shard cannot be told.
    """

    fields: tuple[str, ...]
    keys: np.ndarray
    blocks: np.ndarray
    sizes: np.ndarray
    ignored: int
    damage: tuple[tar.Damage, ...]


def build(path: str) -> ShardIndex:
    """Reads the headers of a shard."""
    file = tar.FilePool().open(path)
    if file.read(0, 2) == _GZIP:
        return _useless(file.size, "it is compressed; samples are read in place: gunzip it first")
    fields: dict[str, int] = {}
    rows: list[tuple[str, dict[int, tuple[int, int]]]] = []
    current: dict[str, dict[int, tuple[int, int]]] = {}
    damage: list[tar.Damage] = []
    ignored = 0
    for member in tar.members(file, damage.append):
        match = _NAME.fullmatch(member.name)
        field = match[2].lower() if match else ""
        if field.rpartition(".")[2] not in KINDS or member.size >= ABSENT:
            ignored += 1
            continue
        column = fields.setdefault(field, len(fields))
        row = current.get(match[1])
        if row is None or column in row:  # a key that comes again is another sample: none is lost
            row = current[match[1]] = {}
            rows.append((match[1], row))
        row[column] = (member.offset // BLOCK, member.size)
        if len(fields) > _MAX_FIELDS:
            shown = f"more than {_MAX_FIELDS} fields, as {sorted(fields)[:3]}"
            return _useless(file.size, f"{shown}: members are named KEY.FIELD, no dot in the key")
    blocks = np.full((len(rows), len(fields)), ABSENT, np.uint32)
    sizes = np.zeros(blocks.shape, np.uint32)
    for i, (_, row) in enumerate(rows):
        for column, (block, size) in row.items():
            blocks[i, column], sizes[i, column] = block, size
    keys = np.array([os.fsencode(key) for key, _ in rows], np.bytes_)
    return ShardIndex(tuple(fields), keys, blocks, sizes, ignored, tuple(damage))


def _useless(size: int, reason: str) -> ShardIndex:
    """Of a file without any sample that can be told."""
    table = np.zeros((0, 0), np.uint32)
    return ShardIndex((), np.zeros(0, "S1"), table, table, 0, (tar.Damage(0, size, reason),))


def cache_directory() -> Path:
    """Where indexes go that cannot lie beside their shards."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "t2i_jax" / "indexes"


def _places(path: str, directory: str) -> list[epath.Path]:
    """Where the index of a shard may be: in `directory`, or ('') beside it or in the cache."""
    name = (
        f"{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}-{os.path.basename(path)}"
    )
    if directory:
        return [epath.Path(directory) / f"{name}{SUFFIX}"]
    return [epath.Path(path + SUFFIX), epath.Path(cache_directory()) / f"{name}{SUFFIX}"]


def _stamp(path: str) -> np.ndarray:
    """What tells whether a shard is the one that was indexed: version, bytes, time."""
    if tar.is_remote(path):
        stat = epath.Path(path).stat()
        return np.array([_VERSION, stat.length, int(stat.mtime)], np.int64)
    stat = os.stat(path)
    return np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _load(place: epath.Path, stamp: np.ndarray) -> ShardIndex | None:
    """The index at `place`; None where there is none of this shard, or it cannot be read."""
    try:
        with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            spans, reasons = stored["damage"].tolist(), stored["reasons"].tolist()
            damage = (tar.Damage(*span, why) for span, why in zip(spans, reasons, strict=True))
            fields = tuple(stored["fields"].tolist())
            tables = stored["keys"], stored["blocks"], stored["sizes"]
            index = ShardIndex(fields, *tables, int(stored["ignored"]), tuple(damage))
            whole = index.blocks.shape == index.sizes.shape == (len(index.keys), len(fields))
            return index if whole else None
    except Exception:  # whatever NumPy and zipfile raise at damaged bytes: it is made anew
        return None


def _save(index: ShardIndex, places: Sequence[epath.Path], stamp: np.ndarray) -> None:
    """Writes to the first place that takes it, all or nothing; to none if none does."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        stamp=stamp,
        fields=np.array(index.fields, np.str_),
        keys=index.keys,
        blocks=index.blocks,
        sizes=index.sizes,
        ignored=index.ignored,
        damage=np.array([(d.start, d.stop) for d in index.damage], np.int64).reshape(-1, 2),
        reasons=np.array([d.reason for d in index.damage], np.str_),
    )
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.parent / f".{place.name}.{uuid.uuid4().hex}"
            new.write_bytes(buffer.getvalue())
            new.replace(place)
            return
        except OSError:
            continue


def _find(path: str, directory: str) -> ShardIndex | None:
    stamp = _stamp(path)
    return next((i for p in _places(path, directory) if (i := _load(p, stamp)) is not None), None)


def _make(path: str, directory: str) -> ShardIndex:
    stamp = _stamp(path)  # before reading: what changes meanwhile is indexed again
    index = build(path)
    _save(index, _places(path, directory), stamp)
    return index


def open_all(
    shards: Sequence[str], directory: str = "", threads: int = 16, processes: int = 0
) -> list[ShardIndex]:
    """The indexes of shards, made where there is none: by `processes`, or (0) by threads."""
    with futures.ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(pool.map(functools.partial(_find, directory=directory), shards))
    missing = [i for i, index in enumerate(found) if index is None]
    if not missing:
        return found
    make = functools.partial(_make, directory=directory)
    with _executor(min(processes, len(missing)), threads) as pool:
        made = pool.map(make, [shards[i] for i in missing])
        if len(missing) < _MANY:
            bar = None
        else:
            bar = Progress(len(missing), name="indexing shards", unit="shards")
        for count, (i, index) in enumerate(zip(missing, made, strict=True), 1):
            found[i] = index
            if bar is not None:
                bar.update(count)
        if bar is not None:
            bar.close()
    return found


def _executor(processes: int, threads: int) -> futures.Executor:
    if processes < 2:
        return futures.ThreadPoolExecutor(max(1, threads))
    import multiprocessing  # not fork: threads of others may hold locks

    return futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
