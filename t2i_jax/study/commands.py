"""What launch/study.py does."""

from collections.abc import Sequence
from pathlib import Path

import jax

from t2i_jax.errors import ConfigError
from t2i_jax.study import laboratory, suite
from t2i_jax.study.board import Board


def main(
    name: str,
    workdir: str | None,
    *,
    only: Sequence[str],
    seeds: Sequence[str],
    steps: int | None,
    rounds: int,
    out: str | None,
) -> None:
    """Runs a suite and writes its report."""
    jax.config.update("jax_platforms", "cpu")  # devices are the workers'
    chosen = suite.load(name).shortened(steps).only(only)
    numbers = _seeds(seeds)
    folder = Path(workdir or f"runs/{chosen.name}")
    board = Board(chosen, numbers)
    laboratory.study(chosen, folder, numbers, rounds=rounds, board=board)


def _seeds(words: Sequence[str]) -> list[int]:
    try:
        seeds = [int(word) for word in words]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={','.join(words)} must be different numbers like 0,1,2.")
    return seeds
