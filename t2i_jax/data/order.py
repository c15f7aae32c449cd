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
from typing import NamedTuple

import grain
import numpy as np

_ORDER, _BUCKET, _REPLACEMENT = 0, 16, 17  # words of the seed; the draws of a sample have 1 to 15
_SCALE = 1 << 30  # to which weights are rounded
_WINDOW = 1024  # steps within which the turns of the buckets are shuffled
_KEPT = 8  # windows that are remembered
NO_BUCKET = -1


class Part(NamedTuple):
    """Samples `start` to `stop` of a source, and their share of the stream (any unit)."""

    start: int
    stop: int
    weight: float


def shuffled(length: int, *seed: int) -> grain.MapDataset:
    """Position -> index, without end: every epoch of `length` positions is a new permutation.

    `seed` is hashed first: grain's seed of epoch e is seed + e, and neighbours would meet.
    """
    if not 0 < length < 2**32:
        raise ValueError(f"a source of {length} samples; 1 to {2**32 - 1} can be shuffled")
    entropy = (seed[0], _ORDER, *seed[1:])
    word = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.range(length).shuffle(seed=word).repeat(reseed_each_epoch=True)


class _Turns:
    """Number -> (which, how many of it came before), in proportion to weights, evenly, endlessly.

    Of the first k places, those after the first kind get floor(k r / t), where r of the total t is
    their weight: place k is theirs if that grows with it, and among them this rule goes on.
    """

    def __init__(self, weights: Sequence[float]):
        total = math.fsum(weights)
        self._weights = [max(1, round(_SCALE * weight / total)) for weight in weights]
        self._total = sum(self._weights)

    def __getitem__(self, number: int) -> tuple[int, int]:
        total = self._total
        for which, weight in enumerate(self._weights):
            rest = total - weight
            before = number * rest // total
            if (number + 1) * rest // total == before:
                return which, number - before
            number, total = before, rest
        raise AssertionError("the last kind has no rest")


class _Stream:
    """The endless stream of some samples of each part: number -> index."""

    def __init__(self, members: Sequence[np.ndarray | range], weights: Sequence[float], seeds):
        kept = [i for i, part in enumerate(members) if len(part)] or [0]  # which `shuffled` refuses
        self.members = [members[i] for i in kept]
        self._shares = np.array([weights[i] for i in kept], float)
        self._orders = [shuffled(len(members[i]), *seeds[i]) for i in kept]
        self._turns = _Turns(self._shares.tolist())

    def __getitem__(self, number: int) -> int:
        part, number = self._turns[number]
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
        self._turns = _Turns([math.fsum(weights[b]) for b in members])
        self._shuffle = shuffled(_WINDOW, seed, _BUCKET)
        self._windows: dict[int, list[tuple[int, int]]] = {}

    def bucket(self, step: int) -> tuple[int, int]:
        """(the bucket of a step, how many steps of that bucket came before)."""
        if self._turns is None:
            return next(iter(self._streams)), step
        window, place = divmod(step, _WINDOW)
        found = self._windows.get(window)  # held here: another thread may forget the others
        if found is None:
            found = self._window(window)
            if len(self._windows) >= _KEPT:
                self._windows = {}
            self._windows[window] = found
        return found[place]

    def _window(self, window: int) -> list[tuple[int, int]]:
        """`bucket` of the steps of a window."""
        steps = range(window * _WINDOW, (window + 1) * _WINDOW)
        turns = [self._turns[step] for step in steps]
        before: dict[int, int] = {}
        for which, number in turns:
            before.setdefault(which, number)
        out = []
        for step in steps:
            which = turns[self._shuffle[step]][0]
            out.append((self._buckets[which], before[which]))
            before[which] += 1
        return out

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
