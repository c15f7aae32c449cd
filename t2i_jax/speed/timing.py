"""How long things take: everything that is compared runs in turns, in one process.

Machines are shared and change their speed: in turns, other load meets all of it. Figures are
medians, with the smallest and the largest beside them; what can be trusted most is a ratio of two
medians of one run.
"""

from collections.abc import Callable, Mapping
import math
import statistics
import time
from typing import Any, NamedTuple

import jax


class Times(NamedTuple):
    """Seconds of the rounds of one thing."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def tree(self) -> dict[str, float]:
        """For a JSON file: {'median', 'least', 'most', 'rounds'}."""
        found = {"median": self.median, "least": min(self.rounds), "most": max(self.rounds)}
        return {name: float(f"{value:.4g}") for name, value in found.items()} | {
            "rounds": len(self.rounds)
        }


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """The times of each of `ways`, after `warmup` rounds that do not count.

    What a way returns is waited for: arrays are ready when its time ends. Every other round goes
    backwards, so that none always comes after the same one.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(warmup + rounds):
        order = list(ways.items())
        for way, run in reversed(order) if i % 2 else order:
            start = clock()
            jax.block_until_ready(run())
            seconds[way].append(clock() - start)
    return {way: Times(tuple(took[warmup:])) for way, took in seconds.items()}


def rounds_for(seconds: float, once: float, least: int) -> int:
    """How many rounds of `once` seconds to measure: at least `least`, and about `seconds` long."""
    return max(least, math.ceil(seconds / once))


def ratio_interval(first: Times, second: Times) -> tuple[float, float]:
    """The 95% interval of `ratio`: of a median, by ranks, whatever the times are distributed as.

    Of n rounds the values of ranks n / 2 -+ 0.98 sqrt(n), within the least and the most.
    """
    pairs = zip(first.rounds, second.rounds, strict=True)
    values = sorted(a / b for a, b in pairs)
    n, reach = len(values), 0.98 * math.sqrt(len(values))
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return values[max(low, 0)], values[min(high, n - 1)]


def ratio(first: Times, second: Times) -> float:
    """Median over the rounds of first / second: load that changes slowly meets both alike."""
    pairs = zip(first.rounds, second.rounds, strict=True)
    return statistics.median(a / b for a, b in pairs)
