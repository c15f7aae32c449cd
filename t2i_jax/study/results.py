"""results.jsonl: everything that a suite has found, a line each; reports are made of it alone.

    {"kind": "suite", ...}   what it was: base config, rows with their diffs, steps
    {"kind": "run", ...}     a training: curves of score and held-out loss, by row and seed
    {"kind": "row", ...}     what needs no training: parameters, FLOPs
    {"kind": "speed", ...}   seconds of training and sampling, in turns with the first row
    {"kind": "machine", ...} where it ran, and how long that took

Lines are in the order of the suite, not in that of the work: the same findings are the same file.
"""

from collections.abc import Iterable, Mapping
import json
from typing import Any

from etils import epath

from t2i_jax import checkpoint
from t2i_jax.errors import MissingError
from t2i_jax.evaluation import benchmarks
from t2i_jax.study import worker
from t2i_jax.study.suite import Run
from t2i_jax.training.metrics import read_metrics

Entry = dict[str, Any]
NAME = "results.jsonl"
_CURVES = ("score", "validation_loss")


def of_run(run: Run, folder: epath.Path) -> Entry | None:
    """What a run has found; None unless its last step is saved. A run that diverged says how."""
    entry = {"kind": "run", "row": run.row.name, "seed": run.seed, "digest": run.digest}
    steps = run.config.train.steps
    if (folder / worker.FAILED).exists():
        return entry | {"failed": (folder / worker.FAILED).read_text()}
    if not _saved(folder, steps):
        return None
    metrics = read_metrics(folder)
    last: dict[str, Any] = {}
    for line in metrics:
        if line["step"] == steps:
            last |= line
    scored = run.config.evaluation.every and run.config.data.source in benchmarks.WORLDS
    wanted = {"loss"} | ({"score"} if scored else set())
    wanted |= {"validation_loss"} if run.config.validation.every else set()
    if not wanted <= last.keys():
        return None
    curves = {
        name: [[line["step"], line[name]] for line in metrics if name in line] for name in _CURVES
    }
    parts = {k.removeprefix("score/"): v for k, v in last.items() if k.startswith("score/")}
    controls = {k: parts.pop(k) for k in list(parts) if k.startswith("control_")}
    return entry | {
        "images": run.config.evaluation.num_images,
        "score": last.get("score"),
        "categories": parts,
        "controls": {k.removeprefix("control_"): v for k, v in controls.items()},
        "validation_loss": last.get("validation_loss"),
        "by_time": {
            k.removeprefix("validation_loss_t"): v
            for k, v in last.items()
            if k.startswith("validation_loss_t")
        },
        "curves": curves,
    }


def _saved(folder: epath.Path, step: int) -> bool:
    try:
        return checkpoint.find(folder)[1] == step
    except MissingError:
        return False


def write(path: epath.PathLike, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes all of a file, or nothing."""
    path = epath.Path(path)
    new = path.parent / f"{path.name}.new"
    lines = (json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries)
    new.write_text("".join(f"{line}\n" for line in lines))
    new.replace(path)


def read(path: epath.PathLike) -> list[Entry]:
    """The entries of a file. Raises MissingError or ValueError that names it."""
    path = epath.Path(path)
    if not path.exists():
        raise MissingError(f"{path}: no such file; launch/study.py --suite=... writes one.")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            entry["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not an entry: {line[:80]!r}") from error
        entries.append(entry)
    return entries
