"""Which files a pattern names: braces, wildcards, several joined by '::'; local and remote."""

import glob
import os
import re

from etils import epath

from t2i_jax.data import tar

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


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
    """The files that `pattern` names, sorted, each once.

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
