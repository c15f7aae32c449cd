"""What is known without training: a suite's settings, a row's sizes and FLOPs, the machine."""

from collections.abc import Sequence
import datetime
import os
import platform
import subprocess
from typing import Any

from flax.core import meta
import jax

from t2i_jax import __version__, build, flops
from t2i_jax.study import controls
from t2i_jax.study.suite import Run, Suite


def of_suite(suite: Suite, seeds: Sequence[int]) -> dict[str, Any]:
    """The settings that all rows share, and what each row changes."""
    c = suite.base
    return {
        "kind": "suite",
        "name": suite.name,
        "base": c.name,
        "data": c.data.source,
        "steps": c.train.steps,
        "batch_size": c.train.batch_size,
        "seeds": list(seeds),
        "images": c.evaluation.num_images,
        "validation_images": c.data.validation_size,
        "sampling": f"{c.sampling.solver}, {c.sampling.steps} steps, "
        f"guidance {c.sampling.guidance:g}",
        "optimizer": c.optimizer.name,
        "chance": controls.chance(c.data.image_size) if c.data.source == "scenes" else None,
        "rows": [{"name": row.name, "diff": dict(row.diff)} for row in suite.rows],
        "groups": {heading: list(rows) for heading, rows in suite.groups.items()},
        "claims": [dict(claim) for claim in suite.claims],
    }


def of_row(run: Run) -> dict[str, Any]:
    """Parameters and FLOPs of a row."""
    trained, frozen = build.abstract_params(run.config)
    step = flops.train_step(run.config)
    return {
        "kind": "row",
        "row": run.row.name,
        "parameters": build.count(meta.unbox(trained)),
        "conditioning": _conditioning(trained),
        "frozen": {k: build.count(meta.unbox(v)) for k, v in frozen.items() if build.count(v)},
        "train_flops": {k: float(v) for k, v in step.items() if v},
        "sample_flops": sum(flops.sample(run.config, 1, run.config.sampling.steps).values()),
        "text_flops": flops.forward(run.config)["llm"],
    }


def _conditioning(trained: Any) -> int:
    """Parameters that tell the DiT the time: modulation, its tables, and the embedding."""
    named, _ = jax.tree_util.tree_flatten_with_path(meta.unbox(trained))
    words = ("modulation", "time", "conditioning")
    paths = ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in named)
    return sum(x.size for path, x in paths if any(word in path for word in words))


def machine(places: int, place: str, seconds: float) -> dict[str, Any]:
    """Where and with what a suite ran; `seconds` of all trainings, one device each."""
    return {
        "kind": "machine",
        "devices": places,
        "device": place.rsplit(" ", 1)[0],
        "cpu": _cpu(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "t2i_jax": __version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
    }


def _cpu() -> str:
    """The model of the CPU, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The checkout's commit; '' where there is none."""
    where = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", where, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
