"""The table of docs/tpu.md: which configs fit which machines, all of it from the compiler.

A process of its own compiles what is asked for one kind of machine, because libtpu takes its flags
once. The encoder of images is compiled once for all configs of a machine.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
import multiprocessing
from pathlib import Path
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError
from t2i_jax.models.layers import REMAT_POLICIES

_ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout
BEGIN, END = "<!-- what fits: begin -->", "<!-- what fits: end -->"
PODS = ("v4-256", "v5e-256", "v5p-256", "v6e-64", "v5e-256*2", "tpu7x")
CHIPS = ("colab-v5e", "colab-v6e")
_FLAGSHIP = "configs/fusion_2b.py"
_TRAINED = (
    _FLAGSHIP,
    "configs/fusion_2b_gemma2.py",
    "configs/ablations/dit_self_attention.py",
    "configs/ablations/dit_cross_attention.py",
)


class Row(NamedTuple):
    """One program that is compiled."""

    config: str  # file, from the root of the checkout
    topology: str
    what: str = "train"  # or 'sample'
    changes: tuple[tuple[str, Any], ...] = ()  # (key, value) beside the file's

    @property
    def name(self) -> str:
        """What it is called in the table, and in `--only`."""
        config = self.config.removeprefix("configs/").removesuffix(".py")
        changes = "".join(f", {key} = {value}" for key, value in self.changes)
        return f"{self.what} {config}{changes} on {self.topology}"


FOUR = (("sampling.batch_size", 4),)  # images at once: 8 rows with guidance
ROWS = (
    *(Row(config, pod) for pod in PODS for config in _TRAINED),
    *(Row(_FLAGSHIP, "v4-256", changes=(("dit.remat", policy),)) for policy in REMAT_POLICIES),
    *(Row(_FLAGSHIP, chip) for chip in CHIPS),
    *(Row("configs/lora_2b.py", chip) for chip in CHIPS),
    *(Row(_FLAGSHIP, chip, "sample", FOUR) for chip in CHIPS),
)


def choose(only: str) -> list[Row]:
    """The rows whose names have the regular expression in them. Raises ConfigError for none."""
    try:
        found = [row for row in ROWS if re.search(only, row.name)]
    except re.error as error:
        raise ConfigError(f"--only={only} is no regular expression: {error}.") from error
    if not found:
        raise ConfigError(f"--only={only} is in none of: " + "; ".join(r.name for r in ROWS) + ".")
    return found


def run(
    rows: Sequence[Row], jobs: int, tell: Callable[[str], Any] = print
) -> Iterator[dict[str, Any]]:
    """{name of a row: its report}, machine by machine as they are done, `jobs` of them at once.

    `tell` is called with a line about each machine.
    """
    by_machine: dict[str, list[Row]] = {}
    for row in rows:
        by_machine.setdefault(row.topology, []).append(row)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(_compile, part): name for name, part in by_machine.items()}
        for done in as_completed(waiting):
            reports = done.result()
            fits = sum(report["fits"] for report in reports.values())
            tell(f"{waiting[done]}: {fits} of {len(reports)} fit")
            yield reports


def changed(row: Row) -> ConfigDict:
    """The config that a row is of."""
    config = configs.load(str(_ROOT / row.config)).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(dict(row.changes))
    return config


def _compile(rows: list[Row]) -> dict[str, Any]:
    from t2i_jax.speed import compile as compiler

    out = {}
    for row in rows:
        make = compiler.sample if row.what == "sample" else compiler.train
        report = make(changed(row), row.topology)
        out[row.name] = {key: value for key, value in report.items() if key != "largest"}
        print(f"  {row.name}: {report['seconds']}", flush=True)
    return out


def table(reports: dict[str, Any]) -> str:
    """The reports as Markdown, in the order of `ROWS`."""
    head = (
        "program",
        "mesh: data x fsdp",
        "images a device",
        "memory, GB",
        "weights and state",
        "frozen",
        "received, GB",
        "of what must",
        "asynchronous",
        "FLOPs, of the model's",
        "compiled in, s",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [_line(row, reports[row.name]) for row in ROWS if row.name in reports]
    for row in ROWS:
        if row.name in reports and not reports[row.name]["fits"]:
            lines += ["", _instead(row, reports[row.name])]
    return "\n".join(lines)


def _instead(row: Row, report: dict[str, Any]) -> str:
    """Why a row does not fit, and what to do."""
    if report["bytes_needed"] is None:
        return f"{row.name} does not fit: {report['problem']}"
    held = sum(report["memory"].values())
    why = f"parameters, averages, moments and frozen weights alone are {_gb(held)} GB a device"
    if held < report["bytes_there"]:
        why = f"beside {_gb(held)} GB that are held, activations have too little room"
    return f"{row.name} does not fit: {why}. What to try: {'; '.join(report['suggestions'])}."


def _line(row: Row, report: dict[str, Any]) -> str:
    memory, mesh = report["memory"], report["mesh"]
    state = sum(memory.get(name, 0) for name in ("parameters", "EMA", "optimiser"))
    seconds = report["seconds"]
    needed, there = report["bytes_needed"], _gb(report["bytes_there"])
    fits = "" if report["fits"] else "**does not fit**: "
    cells = [
        row.name,
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{report['batch_size'] / (mesh['data'] * mesh['fsdp']):g}",
        f"{fits}a kernel" if needed is None else f"{fits}{_gb(needed)} of {there}",
        _gb(state),
        _gb(memory["frozen"]),
        *_travel(report),
        f"{report['flops_ratio']:.3f}" if "flops_ratio" in report else "",
        f"{sum(seconds.values()):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _travel(report: dict[str, Any]) -> list[str]:
    """Bytes received, as a ratio, and how much of the gathered weights comes while others work."""
    if not report.get("collective_bytes"):
        return ["", "", ""]
    gathers = [row for row in report["collectives"] if row["kind"] == "all-gather"]
    total = sum(row["bytes"] for row in gathers)
    beside = sum(row["bytes"] for row in gathers if row["asynchronous"])
    return [
        _gb(report["collective_bytes"]),
        f"{report['collective_ratio']:.2f} x",
        f"{beside / total:.0%} of gathers" if total else "",
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def rewrite(document: Path, text: str) -> None:
    """Puts `text` between the marks of a document. Raises ConfigError where it has none."""
    if not document.is_file():
        raise ConfigError(f"--table={document}: no such file.")
    whole = document.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise ConfigError(f"{document} must have one line {BEGIN} and one {END}.")
    before, rest = whole.split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
