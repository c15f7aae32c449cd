"""The table of docs/tpu.md: which configs fit which machines, all of it from the compiler.

A process of its own compiles what is asked for one kind of machine, because libtpu takes its flags
once. The encoder of images is compiled once for all configs of a machine.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
import importlib.metadata
import multiprocessing
from pathlib import Path
import re
import subprocess
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError
from t2i_jax.models.layers import REMAT_POLICIES
from t2i_jax.speed import advice, tables

_ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout
BEGIN, END = "<!-- what fits: begin -->", "<!-- what fits: end -->"
PODS = ("v4-256", "v5e-256", "v5p-256", "v6e-64", "v5e-256*2", "tpu7x")
CHIPS = ("colab-v5e", "colab-v6e")
KINDS = ("all-gather", "reduce-scatter", "all-reduce")  # that there must be
_FLAGSHIP, _LARGE = "configs/fusion_2b.py", "configs/fusion_2b_gemma2.py"
_FACTORS = ("configs/lora_2b.py", "configs/lora_2b_gemma2.py")
_TRAINED = (
    _FLAGSHIP,
    _LARGE,
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


_FOUR = (("sampling.batch_size", 4),)  # images at once: 8 rows with guidance
# Where each config's own dit.remat, "products", is compared with the others.
_POLICIES = ((_FLAGSHIP, "v4-256"), ("configs/lora_2b.py", "colab-v5e"))
ROWS = (
    *(Row(config, pod) for pod in PODS for config in _TRAINED),
    *(Row(_FLAGSHIP, chip) for chip in CHIPS),
    *(Row(config, chip) for chip in CHIPS for config in _FACTORS),
    *(Row(config, chip, "sample", _FOUR) for chip in CHIPS for config in (_FLAGSHIP, _LARGE)),
    *(
        Row(config, machine, changes=(("dit.remat", policy),))
        for config, machine in _POLICIES
        for policy in REMAT_POLICIES
        if policy != "products"
    ),
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


def made_with() -> dict[str, str]:
    """What a report depends on: the commit of the checkout and the versions of the compiler.

    A commit that ends with '+' had changes that were not committed.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(_ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed_ = "+" if git("status", "--porcelain", "--", "t2i_jax", "configs") else ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"commit": git("rev-parse", "--short=10", "HEAD") + changed_, **versions}


def _compile(rows: list[Row]) -> dict[str, Any]:
    from t2i_jax.speed import compile as compiler

    out, made = {}, made_with()
    for row in rows:
        make = compiler.sample if row.what == "sample" else compiler.train
        report = make(changed(row), row.topology)
        kept = {key: value for key, value in report.items() if key != "largest"}
        out[row.name] = {**kept, "made_with": made}
        print(f"  {row.name}: {report['seconds']}", flush=True)
    return out


_HEAD = (
    "program",
    "mesh: data x fsdp",
    "images a device",
    "memory, GB",
    "encoder's, GB",
    "weights and state",
    "frozen",
    *KINDS,
    "other",
    "of what must",
    "asynchronous",
    "FLOPs, of the model's",
    "compiled in, s",
    "encoder in, s",
)


def table(reports: dict[str, Any]) -> str:
    """The reports as Markdown, in the order of `ROWS`, and what they were made with."""
    lines = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    there = [row for row in ROWS if row.name in reports]
    lines += [_line(row, reports[row.name]) for row in there]
    for row in there:
        if not reports[row.name]["fits"]:
            lines += ["", _instead(row, reports[row.name])]
    made = {tuple(reports[row.name]["made_with"].items()) for row in there}
    words = [", ".join(f"{name} {value}" for name, value in one) for one in sorted(made)]
    if words:
        lines += ["", f"Made with {'; '.join(words)}."]
    return "\n".join(lines)


def _instead(row: Row, report: dict[str, Any]) -> str:
    """Why a row does not fit, and what to do."""
    if report["bytes_needed"] is None:
        return f"{row.name} does not fit: {report['problem']}"
    held = advice.held(report)
    why = f"parameters, averages, moments and frozen weights alone are {_gb(held)} GB a device"
    if held < report["bytes_there"]:
        why = f"beside {_gb(held)} GB that are held, activations have too little room"
    return f"{row.name} does not fit: {why}. What to try: {'; '.join(report['suggestions'])}."


def _line(row: Row, report: dict[str, Any]) -> str:
    memory, mesh, seconds = report["memory"], report["mesh"], report["seconds"]
    state = sum(memory.get(name, 0) for name in ("parameters", "EMA", "optimiser"))
    own, encoder = report["peaks"][report["what"]], report["peaks"].get("encoder")
    needed = "a kernel" if own is None else f"{_gb(own)} of {_gb(report['bytes_there'])}"
    cells = [
        row.name,
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{report['batch_size'] / (mesh['data'] * mesh['fsdp']):g}",
        ("" if report["fits"] else "**does not fit**: ") + needed,
        _gb(encoder) if encoder else "",
        _gb(state),
        _gb(memory["frozen"]),
        *_travel(report),
        f"{report['flops_ratio']:.3f}" if "flops_ratio" in report else "",
        f"{seconds['trace'] + seconds['compile']:.0f}",
        f"{seconds['compile encoder']:.0f}" if seconds["compile encoder"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def _travel(report: dict[str, Any]) -> list[str]:
    """By kind what is received and, in brackets, what must be; their ratio; what overlaps."""
    if not report.get("collective_bytes"):
        return [""] * (len(KINDS) + 3)
    kinds = tables.by_kind(report)
    other = sum(total for kind, (total, _) in kinds.items() if kind not in KINDS)
    pairs = [kinds.get(kind, (0, report["ideal_bytes"].get(kind, 0))) for kind in KINDS]
    return [
        *(f"{_gb(total)} ({_gb(must)})" for total, must in pairs),
        _gb(other),
        f"{report['collective_ratio']:.2f} x",
        _overlapping(report["collectives"]),
    ]


def _overlapping(collectives: list[dict[str, Any]]) -> str:
    """How much of the weights comes while something else is computed.

    They come by gathers, or, in products that the compiler has made loops of, by permutes.
    """
    way, total, beside = "", 0.0, 0.0
    for kind, name in (("all-gather", "gathers"), ("collective-permute", "permutes")):
        rows = [row for row in collectives if row["kind"] == kind]
        size = sum(row["bytes"] for row in rows)
        if size > total:
            way, total = name, size
            beside = sum(row["bytes"] for row in rows if row["asynchronous"])
    return f"{beside / total:.0%} of {way}" if total else ""


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
