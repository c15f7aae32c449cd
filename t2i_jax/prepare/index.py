"""Makes and verifies the indexes of WebDataset shards, and tells which shards are damaged."""

from collections import Counter
import os

import numpy as np

from t2i_jax.data import patterns, shard_index
from t2i_jax.data.shard_index import ABSENT, ShardIndex

_SHOWN = 20  # shards and names that are spelled out


def index(
    pattern: str, directory: str = "", processes: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """(what there is, [(shard, what is wrong with it)]) of the shards that `pattern` names.

    Indexes that are not there, or are not of these shards, are made, by `processes` (default: as
    many as there are cores), and kept in `directory`, or ('') beside the shards.
    Raises FileNotFoundError, and ValueError for what is no tar file.
    """
    shards = patterns.expand(pattern)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = cores if processes is None else processes
    indexes = shard_index.open_all(shards, directory, processes=processes)
    damaged = [
        (shard, f"bytes {d.start:,} to {d.stop:,}: {d.reason}")
        for shard, one in zip(shards, indexes, strict=True)
        for d in one.damage
    ]
    return _describe(shards, indexes), damaged


def _describe(shards: list[str], indexes: list[ShardIndex]) -> str:
    fields: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in indexes:
        there = one.blocks != ABSENT
        fields.update(dict(zip(one.fields, there.sum(0).tolist(), strict=True)))
        sizes = np.where(there, one.sizes, 0).astype(np.int64).sum(0)
        total.update(dict(zip(one.fields, sizes.tolist(), strict=True)))
    samples = sum(len(one.keys) for one in indexes)
    ignored = sum(one.ignored for one in indexes)
    empty = [
        os.path.basename(s) for s, one in zip(shards, indexes, strict=True) if not len(one.keys)
    ]
    width = max(map(len, fields), default=0)
    lines = [f"{len(shards):,} shards, {samples:,} samples"]
    lines += [
        f"  {field:<{width}}  {count:>12,} members, {total[field] / 1e6:,.1f} MB"
        + (f", lacking in {samples - count:,} samples" if count < samples else "")
        for field, count in fields.most_common(_SHOWN)
    ]
    if ignored:
        lines.append(f"  {ignored:,} members of other kinds, which are never read")
    if empty:
        lines.append(f"  {len(empty)} shards without a sample: {', '.join(empty[:_SHOWN])}")
    return "\n".join(lines)
