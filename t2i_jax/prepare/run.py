"""Shards made from published data, by several processes, whenever a run begins or goes on.

Of each shard NAME three files are written, in this order: NAME.skipped.jsonl (what was left out,
and why), NAME.json (what the shard is made of, and how), NAME.tar. So a shard that is there is
complete, and a run that was killed goes on with the first that is not.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import typing

from etils import epath

from t2i_jax.data import tar
from t2i_jax.data.bad import BadSample
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.prepare import archives, shards
from t2i_jax.progress import Progress

BAD_NAME, DUPLICATE = "bad_name", "duplicate_key"  # causes beside those of data.bad.Cause

_VERSION = 1
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in Pillow's messages; another one in every process
_NAMED = 5  # failures that are shown


class Sample(typing.NamedTuple):
    """What is written: `values` by field."""

    key: str
    file: str
    values: dict[str, bytes]


class Skip(typing.NamedTuple):
    """What is not: the cause, and what was found."""

    key: str
    file: str
    cause: str
    detail: str


# Yields all samples of a shard; returns how many its sources have, counted in another way.
Samples = Generator[Sample | Skip, None, int]


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to be made.

    Attributes:
      shard: its name, without '.tar'.
      parts: what to make it from.
      made_of: the same in JSON, without folders; where it differs, the shard is made again.
    """

    shard: str
    parts: typing.Any
    made_of: typing.Any


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did: numbers of shards, of those that were there before, and of samples."""

    name: str
    out: str
    shards: int
    reused: int
    written: int
    skipped: dict[str, int]

    def describe(self) -> str:
        lines = [f"{self.name}: {self.shards:,} shards with {self.written:,} samples in {self.out}"]
        if self.reused:
            lines[0] += f" ({self.reused:,} shards were there)"
        causes = ", ".join(f"{count:,} {cause}" for cause, count in self.skipped.items())
        lines.append(f"skipped: {sum(self.skipped.values()):,}{causes and ' = '}{causes}")
        if self.skipped:
            lines.append(f"by name: {os.path.join(self.out, '*.skipped.jsonl')}")
        return "\n".join(lines)


def attempt(key: str, file: str, make: Callable[[], dict[str, bytes]]) -> Sample | Skip:
    """The sample that `make` gives the values of, or why there is none."""
    if not shards.is_key(key):
        return Skip(key, file, BAD_NAME, "a key has no dots, slashes or control characters")
    try:
        return Sample(key, file, make())
    except BadSample as error:
        return Skip(key, file, str(error.cause), str(error))


def digest(names: Sequence[str]) -> str:
    """Of a list of names, for `Job.made_of`."""
    data = "\0".join(names).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _counted(samples: Samples, total: list[int]) -> Iterator[Sample | Skip]:
    total.append((yield from samples))


def _make(
    samples: Callable[[Job], Samples], out: str, fields: tuple[str, ...], settings: dict, job: Job
) -> dict:
    """Writes a shard and what goes with it; its summary. Raises archives.Damaged, UserError."""
    path, total, skipped = os.path.join(out, job.shard), [], []
    seen: set[str] = set()
    with shards.ShardWriter(f"{path}.tar", fields) as shard:
        for item in _counted(samples(job), total):
            if isinstance(item, Sample) and item.key not in seen:
                shard.write(item.key, item.values)
                seen.add(item.key)
            elif isinstance(item, Sample):
                skipped.append(Skip(item.key, item.file, DUPLICATE, "written already"))
            else:
                skipped.append(item._replace(detail=_ADDRESS.sub("", item.detail)))
        if [len(seen) + len(skipped)] != total:
            raise RuntimeError(
                f"{path}: {len(seen)} written and {len(skipped)} skipped are not the {total} there"
            )
        causes = [skip.cause for skip in skipped]
        summary = {
            "written": len(seen),
            "skipped": {cause: causes.count(cause) for cause in sorted(set(causes))},
            "bytes": shard.finish(),
            "settings": settings,
            "made_of": job.made_of,
        }
        # What is made again goes first: its old bytes would not be those of its new description.
        epath.Path(f"{path}.tar").unlink(missing_ok=True)
        lines = (json.dumps(skip._asdict()) + "\n" for skip in skipped)
        _write_text(f"{path}.skipped.jsonl", "".join(lines))
        _write_text(f"{path}.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return summary


def _write_text(path: str, text: str) -> None:
    """All or nothing; a store of objects does so by itself."""
    if tar.is_remote(path):
        epath.Path(path).write_text(text)
        return
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def _found(out: str, settings: dict, job: Job) -> dict | None:
    """The summary of a shard that is there and complete. Raises ConfigError for another's."""
    path = os.path.join(out, f"{job.shard}.tar")
    try:
        size = archives.stamp(path)[0]
    except FileNotFoundError:
        return None
    try:
        summary = json.loads(epath.Path(os.path.join(out, f"{job.shard}.json")).read_text())
        known = {k: summary[k] for k in ("written", "skipped", "bytes", "settings", "made_of")}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is there, but was not made by this command: it has no {job.shard}.json. Move "
            "it away, or choose another --out."
        ) from error
    if known["settings"] != settings:
        raise ConfigError(
            f"{path} was made with {known['settings']}, not with {settings}. Choose another --out, "
            "or delete what is there."
        )
    if (known["made_of"], known["bytes"]) != (job.made_of, size) or not known["written"]:
        logging.warning(f"{path} was made of other files, or is not whole: it is made again")
        return None
    return known


def run(
    name: str,
    jobs: Sequence[Job],
    samples: Callable[[Job], Samples],
    out: str,
    *,
    fields: tuple[str, ...] = shards.FIELDS,
    settings: dict,
    workers: int | None = None,
) -> Report:
    """Makes the shards that are not there.

    `samples` is called in other processes, unless there is one worker. Raises ConfigError before
    anything is done, and UserError at the end if shards could not be made; the others are there.
    """
    settings = {"data": name, "version": _VERSION, **settings}
    epath.Path(out).mkdir(parents=True, exist_ok=True)
    found = {job.shard: _found(out, settings, job) for job in jobs}
    todo = [job for job in jobs if found[job.shard] is None]
    make = functools.partial(_make, samples, out, fields, settings)
    failed = []
    for job, summary in each(make, todo, workers, name, "shards"):
        if isinstance(summary, archives.Damaged):
            failed.append(f"{job.shard}.tar: {summary}")
        else:
            found[job.shard] = summary
    if failed:
        more = [f"... and {len(failed) - _NAMED} more"] if len(failed) > _NAMED else []
        first = f"{len(failed)} of {len(jobs)} shards could not be made; the others are in {out}."
        last = "Mend that, and run the same command again."
        raise UserError("\n".join([first, *failed[:_NAMED], *more, last]))
    return _report(name, out, list(found.values()), len(jobs) - len(todo))


def _report(name: str, out: str, summaries: list[dict], reused: int) -> Report:
    causes: dict[str, int] = {}
    for summary in summaries:
        for cause, count in summary["skipped"].items():
            causes[cause] = causes.get(cause, 0) + count
    written = sum(summary["written"] for summary in summaries)
    report = Report(name, out, len(summaries), reused, written, dict(sorted(causes.items())))
    if not written:
        raise UserError(
            f"Not one sample could be used; are these the captions of these images?\n"
            f"{report.describe()}"
        )
    return report


def each(
    function: Callable, items: Sequence, workers: int | None, name: str, unit: str
) -> Iterator[tuple[typing.Any, typing.Any]]:
    """(item, function(item)) as they are done; archives.Damaged comes in place of a result."""
    workers = _available() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"{workers} workers; at least one is needed.")
    if not items:
        return
    with Progress(len(items), name=name, unit=unit) as bar:
        bar.update(0)
        done = _done(functools.partial(_guarded, function), items, min(workers, len(items)))
        for count, pair in enumerate(done, 1):
            bar.update(count)
            yield pair


def _available() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _guarded(function: Callable, item: typing.Any) -> typing.Any:
    try:
        return function(item)
    except archives.Damaged as error:
        return error


def _done(function: Callable, items: Sequence, workers: int) -> Iterator[tuple]:
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    # not fork: threads of others may hold locks
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(function, item): item for item in items}
        for future in futures.as_completed(waiting):
            yield waiting[future], future.result()
    except futures.BrokenExecutor as error:
        raise UserError(
            "A worker process died; the machine may be out of memory: try fewer --workers. What "
            "is complete stays: run the same command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
