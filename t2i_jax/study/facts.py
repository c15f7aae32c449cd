"""What is known without training: a suite's settings, a row's sizes and FLOPs, the machine."""

from collections.abc import Sequence
import datetime
import json
import os
import platform
import subprocess
from typing import Any

from etils import epath
from flax.core import meta
import jax

from t2i_jax import __version__, build, flops
from t2i_jax.study import controls
from t2i_jax.study.suite import Run, Suite
from t2i_jax.training import history

_MAKERS = "made_with.json"  # in a run's directory


def chance(suite: Suite, workdir: epath.Path) -> list[int] | None:
    """`controls.chance` of the suite's world, kept in `workdir`; None where there is none."""
    data = suite.base.data
    if data.source != "scenes":
        return None
    file = workdir / f"chance_{data.image_size}.json"
    if not file.exists():
        file.write_text(json.dumps(controls.chance(data.image_size)))
    return json.loads(file.read_text())


def of_suite(suite: Suite, seeds: Sequence[int], by_chance: list[int] | None) -> dict[str, Any]:
    """The settings that all rows share, and what each row changes."""
    c, words = suite.base, ["python launch/study.py", f"--suite={suite.source}"]
    words += [f"--only={','.join(row.name for row in suite.rows)}"] * suite.partial
    words += [f"--steps={c.train.steps}"] * suite.other_steps
    words += [f"--seeds={','.join(map(str, seeds))}"]
    return {
        "kind": "suite",
        "name": suite.name,
        "command": " ".join(words),
        "data": c.data.source,
        "steps": c.train.steps,
        "batch_size": c.train.batch_size,
        "seeds": list(seeds),
        "images": c.evaluation.num_images,
        "validation_images": c.data.validation_size,
        "sampling": f"{c.sampling.solver}, {c.sampling.steps} steps, "
        f"guidance {c.sampling.guidance:g}",
        "optimizer": c.optimizer.name,
        "chance": by_chance,
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


def device() -> str:
    """What this process computes on."""
    first = jax.devices()[0]
    return "core" if first.platform == "cpu" else first.device_kind


def note_maker(folder: epath.Path) -> None:
    """Writes down, once for every maker, with what a run in `folder` is made."""
    made = {
        "device": device(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "t2i_jax": __version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    before = makers(folder)
    if made not in before:
        (folder / _MAKERS).write_text(json.dumps([*before, made]))


def makers(folder: epath.Path) -> list[dict[str, str]]:
    """What `note_maker` wrote."""
    file = folder / _MAKERS
    return json.loads(file.read_text()) if file.exists() else []


def of_machines(folders: Sequence[epath.Path]) -> dict[str, Any]:
    """With what all runs were made: every different value, and the seconds of all of them."""
    made = [maker for folder in folders for maker in makers(folder)]
    keys = dict.fromkeys(key for maker in made for key in maker)
    values = {key: sorted({maker[key] for maker in made}) for key in keys}
    took = [history.seconds(folder) for folder in folders if (folder / history.FILE).exists()]
    return {"kind": "machine", **values, "runs": len(took), "seconds": round(sum(took))}


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
