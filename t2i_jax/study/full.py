"""The published runs of the study: what they are, what they cost, the commands, and their start.

The cost of a run is its FLOPs, counted on the program (flops.py), over what the devices do in an
hour:

    device-hours = steps x FLOPs a step / (peak FLOP/s of a device x MFU) / 3600

with the MFU (model FLOPs utilisation) that is assumed; what recomputation or the vendor's peak do
to it is in there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import sys
from typing import Protocol

from flax.core import meta
from ml_collections import ConfigDict

from t2i_jax import build, flops
from t2i_jax import config as configs
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.machines import CHIPS
from t2i_jax.study import queue
from t2i_jax.study.suite import Published
from t2i_jax.training.preemption import EXIT_PREEMPTED, PreemptedError

# The benchmarks of the paper's tables; docs/evaluation.md has what each needs.
_EVALUATIONS = (
    "--benchmark=geneval --prompts=geneval/prompts/evaluation_metadata.jsonl --scorer=geneval",
    "--benchmark=dpg --prompts=ELLA/dpg_bench/prompts --scorer=ELLA",
    "--benchmark=mjhq --prompts=MJHQ/meta_data.json --reference=MJHQ/mjhq30k_imgs "
    "--inception=inception.safetensors",
)


class Asked(Protocol):
    """The options that are read here."""

    only: Sequence[str]
    steps: int | None
    chip: str
    devices: int
    mfu: float
    launch: bool
    arguments: Sequence[str]


def main(suite: Published, root: str, asked: Asked) -> None:
    """Prints the plan; where it is asked to launch, starts the trainings one after the other.

    Raises ConfigError for an unknown row or chip, UserError where a training ended with an error,
    PreemptedError where it was asked to stop.
    """
    if asked.chip not in CHIPS:
        raise ConfigError(f"--chip={asked.chip}: known are {', '.join(CHIPS)}.")
    files = suite.only(asked.only)
    loaded = {name: configs.load(str(file)) for name, file in files.items()}
    print(plan(loaded, root, asked))
    if asked.launch:
        for name, file in files.items():
            _train(name, file, root, asked)


def device_hours(config: ConfigDict, asked: Asked) -> float:
    """Of the whole training."""
    work = (asked.steps or config.train.steps) * sum(flops.train_step(config).values())
    return work / (CHIPS[asked.chip].peak * asked.mfu) / 3600


def plan(loaded: Mapping[str, ConfigDict], root: str, asked: Asked) -> str:
    """A table of the runs, and the commands of each."""
    rows = [("config", "trained", "steps", "batch", "PFLOP a step", "device-hours", "days")]
    total = 0.0
    for name, config in loaded.items():
        hours = device_hours(config, asked)
        total += hours
        cells = [
            name,
            f"{build.count(meta.unbox(build.abstract_params(config)[0])) / 1e9:.2f}B",
            f"{asked.steps or config.train.steps:,}",
            f"{config.train.batch_size}",
            f"{sum(flops.train_step(config).values()) / 1e15:.2f}",
        ]
        rows.append((*cells, f"{hours:,.0f}", f"{hours / asked.devices / 24:.1f}"))
    rows.append(("all", *[""] * 4, f"{total:,.0f}", f"{total / asked.devices / 24:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        rest = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{name:<{widths[0]}}", *rest]))
    chip = CHIPS[asked.chip]
    head = (
        f"{asked.devices} x {asked.chip}, {chip.peak / 1e12:g} TFLOP/s each, at an MFU of "
        f"{asked.mfu:.0%} (--devices, --chip, --mfu); FLOPs are counted on the programs."
    )
    return "\n\n".join([head, "\n".join(lines), *(_commands(n, root, asked) for n in loaded)])


def _commands(name: str, root: str, asked: Asked) -> str:
    where = f"{root}/{name}"
    words = _words(f"configs/{name}.py", where, asked)
    lines = [f"# {name}", " ".join(["python", "launch/train.py", *words])]
    for flags in _EVALUATIONS:
        kind = flags.split()[0].split("=")[1]
        places = f"--images={where}/{kind} --out={where}/{kind}.json"
        lines.append(f"python launch/evaluate.py --checkpoint={where} {flags} {places}")
    return "\n".join(lines)


def _words(config: str, where: str, asked: Asked) -> list[str]:
    steps = [f"--config.train.steps={asked.steps}"] if asked.steps else []
    return [f"--config={config}", f"--workdir={where}", *steps]


def _train(name: str, file: Path, root: str, asked: Asked) -> None:
    """A training, in a process of its own; one that has ended before is over at once."""
    print(f"\n== {name}", flush=True)
    script = str(configs.find_folder("launch") / "train.py")
    words = _words(str(file), f"{root}/{name}", asked)
    status = queue.foreground([sys.executable, script, *words, *asked.arguments])
    if status == EXIT_PREEMPTED:
        raise PreemptedError(f"{name} was stopped; start again to go on.")
    if status:
        raise UserError(f"{name} ended with status {status}; start again to go on from there.")
