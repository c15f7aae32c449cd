"""A suite: rows of (name, config diff) on one base config, each trained with every seed.

A suite is a Python file like a config:

    def get_config() -> ConfigDict: ...      # what all rows share: data, steps, batch, evaluation
    ROWS = [("baseline", {}), ("wide", {"dit.width": 192}), ...]

and, where wanted, GROUPS = {heading: [row, ...]} for the report and CLAIMS (claims.py). The first
row is the one that the others are compared with. A diff names keys of configs/base.py;
'pretrain.*' and 'llm.*' in it make a language model of the row's own, rows that do not differ in
these share one. `Run.digest` names what is computed, whatever the row is called.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError
from t2i_jax.study import claims, parts
from t2i_jax.study.digests import digest

FOLDER = "configs/suites"
# What a row may not change: all rows are trained and examined alike.
BUDGET = ("train.steps", "train.batch_size", "seed", "evaluation.", "validation.", "sampling.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One design: its name and what it changes in the base config."""

    name: str
    diff: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of the suite: a row, a seed, the whole config, and what parts it needs.

    Paths of parts in the config are relative to the suite's working directory.
    """

    row: Row
    seed: int
    config: ConfigDict
    needs: tuple[parts.Part, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Below the suite's working directory; other settings have another one."""
        return f"runs/{self.row.name}/seed_{self.seed}-{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """16 hex digits of everything that decides the result; the name is no part of it."""
        values = configs.flat(self.config)
        return digest({key: value for key, value in values.items() if key != "name"})


@dataclasses.dataclass(frozen=True)
class Suite:
    """Rows on a base config.

    Attributes:
      name: of the file.
      base: the config that rows differ from, valid and locked.
      source: what it was loaded by.
      partial, other_steps: whether these are not all of its rows, or not as many steps.
      groups: headings of the report, with their rows.
      claims: as `claims.check` has them.
    """

    name: str
    base: ConfigDict
    rows: tuple[Row, ...]
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    claims: Sequence[Mapping[str, Any]] = ()
    source: str = ""
    partial: bool = False
    other_steps: bool = False

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """All rows with the first seed, then with the second, ...

        Raises ConfigError that names the row whose config is not valid.
        """
        return [self.run(row, seed) for seed in seeds for row in self.rows]

    def run(self, row: Row, seed: int) -> Run:
        """A row with a seed. Raises ConfigError that names the row."""
        config = self.base.copy_and_resolve_references().unlock()
        known = configs.flat(config)
        for key, value in row.diff.items():
            if key not in known:
                hint = configs.did_you_mean(configs.nearest(key, known))
                raise ConfigError(f"row {row.name!r}: {key} is not a key of configs/base.py.{hint}")
            try:
                config.update_from_flattened_dict({key: value})
            except TypeError as error:
                raise ConfigError(f"row {row.name!r}: {key} = {value!r}: {error}") from error
        config.seed, config.name = seed, f"study/{row.name}"
        needed = parts.point(config, self.base)
        try:
            configs.validate(config, configs.base())
        except ConfigError as error:
            raise ConfigError(f"row {row.name!r}: {error}") from error
        return Run(row, seed, config.lock(), tuple(needed))

    def only(self, names: Sequence[str]) -> "Suite":
        """The suite of these rows alone, in the suite's order."""
        if not names:
            return self
        _known(names, [row.name for row in self.rows], self.name)
        rows = tuple(row for row in self.rows if row.name in names)
        return dataclasses.replace(self, rows=rows, partial=len(rows) < len(self.rows))

    def shortened(self, steps: int | None) -> "Suite":
        """With another number of training steps; what happens at steps keeps its share of them."""
        if steps is None or steps == self.base.train.steps:
            return self
        base, share = self.base.copy_and_resolve_references(), steps / self.base.train.steps
        with base.unlocked():
            base.train.steps = steps
            for section in (base.validation, base.evaluation, base.checkpoint, base.sampling):
                if section.every:
                    section.every = max(1, round(section.every * share))
        configs.validate(base, configs.base())
        return dataclasses.replace(self, base=base.lock(), other_steps=True)


@dataclasses.dataclass(frozen=True)
class Published:
    """Configs that are printed with their cost, and trained on a pod: {name: file}."""

    name: str
    files: Mapping[str, Path]

    def only(self, names: Sequence[str]) -> dict[str, Path]:
        """The files of these configs alone, or all. Raises ConfigError for an unknown one."""
        _known(names, list(self.files), self.name)
        return {name: file for name, file in self.files.items() if not names or name in names}


def _known(names: Sequence[str], known: Sequence[str], suite: str) -> None:
    for name in names:
        if name not in known:
            near = configs.did_you_mean(difflib.get_close_matches(name, known, 1))
            raise ConfigError(f"{suite} has no row {name!r}: {', '.join(known)}.{near}")


def load(name: str) -> Suite | Published:
    """The suite of a file, or of configs/suites/<name>.py; of one with CONFIGS, Published.

    Raises ConfigError that says what is wrong with it, or which there are.
    """
    path = Path(name)
    if path.suffix != ".py":
        folder = configs.find_folder(FOLDER)
        path = folder / f"{name}.py"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("[!_]*.py"))
            near = configs.did_you_mean(difflib.get_close_matches(name, known, 1))
            raise ConfigError(
                f"--suite={name}: known are {', '.join(known)}, or the path of a .py file.{near}"
            )
    module = configs.module(str(path))
    if hasattr(module, "CONFIGS"):
        folder = configs.find_folder("configs")
        return Published(path.stem, {name: folder / f"{name}.py" for name in module.CONFIGS})
    rows = _rows(module, path)
    names = [row.name for row in rows]
    groups = dict(getattr(module, "GROUPS", {}))
    if unknown := [row for group in groups.values() for row in group if row not in names]:
        raise ConfigError(f"{path}: GROUPS names {unknown[0]!r}, which is no row.")
    found = claims.check(getattr(module, "CLAIMS", ()), names, path)
    return Suite(path.stem, configs.load(str(path)), rows, groups, found, name)


def _rows(module: ModuleType, path: Path) -> tuple[Row, ...]:
    found = getattr(module, "ROWS", None)
    if not isinstance(found, (list, tuple)) or not found:
        raise ConfigError(f"{path} defines no ROWS: a list of (name, {{key: value}}).")
    rows = []
    for entry in found:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ConfigError(f"{path}: {entry!r} in ROWS is not (name, {{key: value}}).")
        name, diff = entry
        if not isinstance(name, str) or not isinstance(diff, Mapping):
            raise ConfigError(f"{path}: {entry!r} in ROWS is not (name, {{key: value}}).")
        if wrong := [key for key in diff if str(key).startswith(BUDGET)]:
            raise ConfigError(
                f"{path}: row {name!r} changes {', '.join(wrong)}, which all rows share."
            )
        rows.append(Row(name, dict(diff)))
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two rows are called {twice[0]!r}.")
    return tuple(rows)
