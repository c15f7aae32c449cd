"""Which published files there are, and how they are cut into shards."""

from collections.abc import Iterator
import json
import logging
import os
import re

from t2i_jax.data import patterns, tar
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.prepare import archives, run

_NUMBERED = re.compile(r"(\d+)\.(?:tar|tgz|tar\.gz)$")
_COUNTS = "counts.json"
_SHOWN = 9  # numbers that a warning names


def expand(pattern: str) -> list[str]:
    """The files that --images names, sorted. Raises MissingError."""
    missing = []
    for part in pattern.split("::"):
        for path in patterns.expand_braces(part.strip()):
            try:
                patterns.expand(path)
            except FileNotFoundError:
                missing.append(path)
    if missing:
        raise MissingError(
            f"There is no {missing[0]} (and {len(missing) - 1} more are missing of {pattern!r}). "
            "Download them, or narrow --images to those that are there: 'DIR/*.tar'."
        )
    return patterns.expand(pattern)


def numbered_archives(pattern: str) -> dict[int, str]:
    """Archives by the number that ends their names, rising. Raises MissingError, ConfigError.

    A folder stands for the tar files in it.
    """
    if archives.is_folder(pattern):
        pattern = os.path.join(pattern, "*.tar")
    found: dict[int, str] = {}
    for path in expand(pattern):
        match = _NUMBERED.search(path)
        if match is None:
            raise ConfigError(f"{path} is no numbered archive, as cc12m-train-0000.tar or 000.tgz.")
        if int(match[1]) in found:
            raise ConfigError(f"{found[int(match[1])]} and {path} have the same number.")
        found[int(match[1])] = path
    return {number: found[number] for number in sorted(found)}


def numbered(images: str, limit: int) -> dict[int, str]:
    """Archives NNN.tgz (.tar) or folders NNN, by number below `limit`, rising.

    `images` is the folder that has them, where an archive goes before a folder of the same number,
    or a pattern of archives. Raises MissingError if there is none, and warns of those that lack.
    """
    if archives.is_folder(images):
        there = set(archives.names(images))
        endings = (*archives.ARCHIVES, "")
        options = {n: [f"{n:03d}{ending}" for ending in endings] for n in range(limit)}
        chosen = {n: next((o for o in names if o in there), None) for n, names in options.items()}
        found = {n: os.path.join(images, name) for n, name in chosen.items() if name}
    else:
        found = {n: path for n, path in numbered_archives(images).items() if n < limit}
    if not found:
        raise MissingError(
            f"{images!r} has no 000.tgz, 001.tgz, ..., and no folders 000, 001, ...; name the "
            "folder data/train/imgs of JourneyDB."
        )
    absent = [f"{n:03d}" for n in range(limit) if n not in found]
    if absent:
        more = ", ..." if len(absent) > _SHOWN else ""
        logging.warning(
            f"{images}: {len(absent)} of {limit} archives or folders are not there: "
            f"{', '.join(absent[:_SHOWN])}{more}"
        )
    return found


def of_images(images: str) -> list[str]:
    """Archives, or folders of images, in order. Raises MissingError."""
    if not archives.is_folder(images):
        return expand(images)
    names = sorted(archives.names(images))
    found = [name for name in names if name.endswith(archives.ARCHIVES)]
    if not found and not any(map(archives.is_image, names)):
        found = [name for name in names if archives.is_folder(os.path.join(images, name))]
    return [os.path.join(images, name) for name in found] or [images]


def _count(path: str) -> int:
    return sum(1 for _ in archives.images(path))


def count(paths: list[str], cache: str, workers: int | None) -> dict[str, int]:
    """Images by archive. Raises archives.Damaged.

    Reading all headers takes long; what was counted is kept in the folder `cache`.
    """
    file = os.path.join(cache, _COUNTS)
    try:
        with open(file, "rb") as stored:
            known = json.load(stored)
    except (FileNotFoundError, ValueError):
        known = {}
    stamps = {path: list(archives.stamp(path)) for path in paths}
    todo = [path for path in paths if known.get(path, {}).get("stamp") != stamps[path]]
    damaged = []
    for path, number in run.each(_count, todo, workers, "counting images", "files"):
        if isinstance(number, archives.Damaged):
            damaged.append(str(number))
        else:
            known[path] = {"stamp": stamps[path], "images": number}
    if todo:
        os.makedirs(cache, exist_ok=True)
        with open(f"{file}.partial", "w", encoding="utf-8") as stored:
            json.dump(known, stored)
        os.replace(f"{file}.partial", file)
    if damaged:
        raise archives.Damaged("\n".join(damaged))
    return {path: known[path]["images"] for path in paths}


def cut(counts: list[tuple[str, int]], per_shard: int) -> Iterator[list[tuple[str, int, int]]]:
    """Sources with their numbers of images -> of each shard (source, first, last + 1), in order."""
    parts, room = [], per_shard
    for path, number in counts:
        start = 0
        while start < number:
            stop = min(start + room, number)
            parts.append((path, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield parts
                parts, room = [], per_shard
    if parts:
        yield parts


def keep(sources: list[str], shards: list[str]) -> None:
    """Refuses to write a shard over what it is made from. Raises ConfigError."""
    kept = {_normal(path) for path in sources}
    for path in shards:
        if _normal(path) in kept:
            raise ConfigError(f"{path} would be written over its source; choose another --out.")


def _normal(path: str) -> str:
    return path if tar.is_remote(path) else os.path.realpath(path)


def cache_folder(out: str, cache: str | None) -> str:
    """Where what is unpacked, indexed and counted stays: in `out`, where that is local."""
    if cache is None and tar.is_remote(out):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return os.path.join(base, "t2i_jax", "prepare")
    return os.path.join(out, ".cache") if cache is None else cache
