"""Which sample stands where: a function of (seed, place) that is computed, not stored.

The global stream of samples is numbered by *position*: step s of a batch size B holds the positions
s B to (s + 1) B. Every part of the data (one, or those of a mixture) is shuffled anew in every
epoch of its own; parts take turns in proportion to their weights. With buckets, a step belongs to
one of them: buckets take turns likewise, shuffled within 1,024 steps, and the k-th step of a bucket
holds the positions k B to (k + 1) B of the stream of that bucket alone. So every step is reached
directly: there is no state.
"""

from collections.abc import Sequence
import math
import sys
from typing import NamedTuple

import grain
import numpy as np

_ORDER, _BUCKET, _REPLACEMENT = 0, 16, 17  # words of the seed; the draws of a sample have 1 to 15
_WINDOW = 1024  # steps within which the turns of the buckets are shuffled
NO_BUCKET = -1


class Part(NamedTuple):
    """Samples `start` to `stop` of a source, and their share of the stream (any unit)."""

    start: int
    stop: int
    weight: float


def _word(*entropy: int) -> int:
    """Seeds are hashed first: grain's seed of epoch e is seed + e, and neighbours would meet."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def shuffled(length: int, *seed: int) -> grain.MapDataset:
    """Position -> index, without end: every epoch of `length` positions is a new permutation."""
    if not 0 < length < 2**32:
        raise ValueError(f"a source of {length} samples; 1 to {2**32 - 1} can be shuffled")
    word = _word(seed[0], _ORDER, *seed[1:])
    return grain.MapDataset.range(length).shuffle(seed=word).repeat(reseed_each_epoch=True)


def _turns(weights: Sequence[float]) -> grain.MapDataset | None:
    """Number -> (which, how many of it came before), in proportion to the weights, without end."""
    if len(weights) == 1:
        return None
    endless = [
        grain.MapDataset.range(sys.maxsize).map(lambda k, which=which: (which, k))
        for which in range(len(weights))
    ]
    return grain.MapDataset.mix(endless, weights)


class _Stream:
    """The endless stream of some samples of each part: number -> index."""

    def __init__(self, members: Sequence[np.ndarray | range], weights: Sequence[float], seeds):
        kept = [i for i, part in enumerate(members) if len(part)] or [0]  # which `shuffled` refuses
        self.members = [members[i] for i in kept]
        self._shares = np.array([weights[i] for i in kept], float)
        self._orders = [shuffled(len(members[i]), *seeds[i]) for i in kept]
        self._turns = _turns(self._shares.tolist())

    def __getitem__(self, number: int) -> int:
        part, number = (0, number) if self._turns is None else self._turns[number]
        return int(self.members[part][self._orders[part][number]])

    def draw(self, rng: np.random.Generator) -> int:
        """Any of them, at its share."""
        part = rng.choice(len(self.members), p=self._shares / self._shares.sum())
        return int(self.members[part][rng.integers(len(self.members[part]))])


class Order:
    """(step, row) -> index of a sample.

    `parts` cover the source. `bucket_N`, if given, is the bucket of every sample (NO_BUCKET: it
    never comes), of `num_buckets`; one without samples never has a step.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batch_size: int,
        seed: int,
        bucket_N: np.ndarray | None = None,
        num_buckets: int = 1,
    ):
        self._batch_size, self._seed = batch_size, seed
        if bucket_N is None:
            alone = len(parts) == 1
            seeds = [(seed,) if alone else (seed, 0, i) for i in range(len(parts))]
            ranges = [range(part.start, part.stop) for part in parts]
            self._streams = {0: _Stream(ranges, [part.weight for part in parts], seeds)}
            self._turns = None
            return
        members = _members(parts, bucket_N, num_buckets)
        weights = {
            b: [
                len(m) * part.weight / (part.stop - part.start)
                for m, part in zip(ms, parts, strict=True)
            ]
            for b, ms in members.items()
        }
        self._streams = {
            b: _Stream(ms, weights[b], [(seed, b + 1, i) for i in range(len(parts))])
            for b, ms in members.items()
        }
        self._buckets = list(members)
        self._turns = _turns([math.fsum(weights[b]) for b in members])
        if self._turns is not None:
            self._turns = self._turns.window_shuffle(_WINDOW, seed=_word(seed, _BUCKET))

    def bucket(self, step: int) -> tuple[int, int]:
        """(the bucket of a step, how many steps of that bucket came before)."""
        if self._turns is None:
            return next(iter(self._streams)), step
        which, number = self._turns[step]
        return self._buckets[which], number

    def index(self, step: int, row: int) -> int:
        """The sample in a row of the batch of a step."""
        bucket, number = self.bucket(step)
        return self._streams[bucket][number * self._batch_size + row]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """What stands there where the sample, and all earlier attempts, cannot be used."""
        rng = np.random.default_rng((self._seed, _REPLACEMENT, step, row, attempt))
        return self._streams[self.bucket(step)[0]].draw(rng)


def _members(
    parts: Sequence[Part], bucket_N: np.ndarray, num_buckets: int
) -> dict[int, list[np.ndarray]]:
    """bucket -> the indices of its samples, part by part; buckets without samples are left out."""
    found = {}
    for bucket in range(num_buckets):
        members = [
            (np.flatnonzero(bucket_N[part.start : part.stop] == bucket) + part.start).astype("u4")
            for part in parts
        ]
        if sum(map(len, members)):
            found[bucket] = members
    if not found:
        raise ValueError("No sample belongs to any bucket.")
    return found
