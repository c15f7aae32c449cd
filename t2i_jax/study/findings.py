"""The entries of results.jsonl as a reader asks for them: by row, with readings.

scores, losses       by row and seed, after the last step; of the losses the logarithm
against_first(...)   every row minus the first one: after as many steps, or after as many FLOPs
against(pairs)       rows minus others
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

from t2i_jax.evaluation import intervals
from t2i_jax.study import readings
from t2i_jax.study.readings import Difference, Reading

Entry = Mapping[str, Any]
_SHUFFLED = "data.shuffle_captions"


class Findings:
    """What a suite has found.

    Raises ValueError where there is no suite, or its first row has no run.

    Attributes:
      suite, machine: their entries; machine may be {}.
      rows: names in order, those that have a run.
      first: the row that the others are compared with.
      facts, speeds: entries by row.
      runs: entries of complete runs by row and seed; `failed` of those that diverged.
    """

    def __init__(self, entries: Sequence[Entry]):
        kinds: dict[str, list[Entry]] = {}
        for entry in entries:
            kinds.setdefault(entry["kind"], []).append(entry)
        if not kinds.get("suite"):
            raise ValueError("These are no findings of a suite: there is no entry of kind 'suite'.")
        self.suite: Entry = kinds["suite"][0]
        self.machine: Entry = (kinds.get("machine") or [{}])[-1]
        self.facts = {entry["row"]: entry for entry in kinds.get("row", [])}
        self.speeds = {entry["row"]: entry for entry in kinds.get("speed", [])}
        self.runs: dict[str, dict[int, Entry]] = {}
        self.failed: dict[str, dict[int, Entry]] = {}
        for entry in kinds.get("run", []):
            group = self.failed if "failed" in entry else self.runs
            group.setdefault(entry["row"], {})[entry["seed"]] = entry
        self.diffs = {row["name"]: row["diff"] for row in self.suite["rows"]}
        self.rows = [name for name in self.diffs if name in self.runs]
        self.first = next(iter(self.diffs))
        if self.first not in self.rows:
            raise ValueError(
                f"No run of {self.first!r} has ended, with which all other rows are compared."
            )

    @functools.cached_property
    def controls(self) -> list[str]:
        """Rows that were trained with the captions of other pictures."""
        return [name for name in self.rows if self.diffs[name].get(_SHUFFLED)]

    @functools.cached_property
    def floor(self) -> list[str]:
        """Rows whose scores are not above chance, and controls: their spread is not the others'."""
        if not self.scored or not self.suite.get("chance"):
            return self.controls
        limit = intervals.wilson(*self.suite["chance"])[1]
        low = {
            row: intervals.wilson(*self.right(list(self.scores[row].values())))[0]
            for row in self.rows
        }
        return [row for row in self.rows if row in self.controls or low[row] <= limit]

    def right(self, shares: Sequence[float]) -> tuple[int, int]:
        """(right, all) pictures of some scores of runs."""
        images = self.suite["images"]
        return round(sum(shares) * images), len(shares) * images

    @property
    def scored(self) -> bool:
        """Whether there is a score of every run."""
        return all(self.scores.values())

    @property
    def validated(self) -> bool:
        """Whether there is a held-out loss of every run."""
        return all(self.losses.values())

    def values(self, name: str) -> dict[str, dict[int, float]]:
        """'score' or 'validation_loss' after the last step, by row and seed."""
        return {
            row: {s: run[name] for s, run in self.runs[row].items() if run[name] is not None}
            for row in self.rows
        }

    @functools.cached_property
    def scores(self) -> dict[str, dict[int, float]]:
        return self.values("score")

    @functools.cached_property
    def losses(self) -> dict[str, dict[int, float]]:
        """Of held-out losses the mean over the noise levels of their natural logarithms.

        So that no level outweighs the others; differences are ratios of geometric means.
        """

        def one(run: Entry) -> float:
            return sum(map(math.log, run["by_time"].values())) / len(run["by_time"])

        return {
            row: {s: one(run) for s, run in self.runs[row].items() if run["by_time"]}
            for row in self.rows
        }

    def means(self, values: readings.Values) -> dict[str, Reading]:
        return readings.means(values, self.floor)

    def categories(self) -> dict[str, dict[str, Reading]]:
        """Score by category and row."""
        names = list(next(iter(self.runs[self.first].values()))["categories"])
        return {
            name: self.means(
                {
                    row: {s: run["categories"][name] for s, run in self.runs[row].items()}
                    for row in self.rows
                }
            )
            for name in names
        }

    def flops(self, row: str) -> float:
        """Of a training step."""
        return sum(self.facts[row]["train_flops"].values())

    def against_first(self, values: readings.Values) -> dict[str, Difference]:
        """Every row minus the first, of the same seed, after as many steps."""
        rest = {row: v for row, v in values.items() if row != self.first}
        reference = {row: values[self.first] for row in rest}
        return readings.differences(rest, reference, readings.spread(values, self.floor))

    def against(self, pairs: Sequence[tuple[str, str]], values: readings.Values):
        """{pair: its first row minus its second one}, of the same seed, after as many steps."""
        known = [pair for pair in pairs if pair[0] in values and pair[1] in values]
        return readings.differences(
            {pair: values[pair[0]] for pair in known},
            {pair: values[pair[1]] for pair in known},
            readings.spread(values, self.floor),
        )

    def at_equal_flops(self) -> dict[str, Difference]:
        """Scores minus the first row's, both after the FLOPs of the one that took fewer."""
        here: dict[str, dict[int, float]] = {}
        there: dict[str, dict[int, float]] = {}
        steps = self.suite["steps"]
        for row in self.rows[1:]:
            cost = min(self.flops(row), self.flops(self.first)) * steps
            here[row] = self._read(row, cost / self.flops(row))
            there[row] = self._read(self.first, cost / self.flops(self.first))
        paired = {
            row: {s: y - there[row][s] for s, y in v.items() if s in there[row]}
            for row, v in here.items()
        }
        return readings.differences(here, there, readings.spread(paired, self.floor))

    def _read(self, row: str, step: float) -> dict[int, float]:
        found = {s: readings.at(run["curves"]["score"], step) for s, run in self.runs[row].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def curve(self, row: str, name: str) -> list[tuple[float, float]]:
        """(step, mean over the seeds) of 'score' or 'validation_loss'."""
        points: dict[float, list[float]] = {}
        for run in self.runs[row].values():
            for step, value in run["curves"][name]:
                points.setdefault(step, []).append(value)
        return [(step, sum(v) / len(v)) for step, v in sorted(points.items())]

    def control(self, name: str) -> dict[str, float]:
        """Mean over the seeds of a control ('shuffled', 'null'), by row."""
        found = {}
        for row in self.rows:
            seen = [run["controls"][name] for run in self.runs[row].values()]
            found[row] = sum(seen) / len(seen)
        return found
