"""From the start of a process to its first training step: launch/train.py, cold and warm.

Real processes in one working directory, in which the tokenizer and the language model are made
first, if the config asks for them. A cold start finds no compiled programs, a warm one those of
the cold one before. What takes the time is told by the run: its output, <workdir>/history.jsonl,
and what JAX logs of compiling (JAX_LOG_COMPILES).
"""

from collections.abc import Sequence
import os
from pathlib import Path
import re
import statistics
import subprocess
import tempfile
import time
from typing import Any

from t2i_jax import compilation_cache, jsonlines
from t2i_jax.errors import UserError
from t2i_jax.speed.timing import Times
from t2i_jax.training import history, metrics

_LIMIT = 3600.0  # seconds, for one start
_COMPILED = re.compile(r"Finished XLA compilation of (\S+) in ([\d.e+-]+) sec")


def measure(command: Sequence[str], rounds: int = 2) -> dict[str, Any]:
    """Seconds of `rounds` cold and warm starts of `command`, which takes --workdir, in turns.

    'same' is whether the first step of every start gave the same metrics, bit by bit. Raises
    UserError where a start fails, with what it said.
    """
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        start(command, workdir, Path(folder) / "first")
        for i in range(rounds):
            for way in starts:
                starts[way].append(start(command, workdir, Path(folder) / f"programs{i}"))
    first = [one.pop("metrics") for ones in starts.values() for one in ones]
    return {"what": "startup", "same": all(one == first[0] for one in first)} | {
        way: {
            "seconds": Times(tuple(one["seconds"] for one in ones)).tree(),
            "parts": {
                part: round(statistics.median(one[part] for one in ones), 3)
                for part in ones[0]
                if part != "seconds"
            },
        }
        for way, ones in starts.items()
    }


def start(command: Sequence[str], workdir: Path, programs: Path) -> dict[str, Any]:
    """One process, ended when its first step is done: its seconds by part, and that step's metrics.

    Parts: 'imports' up to the plan, 'set-up' up to the first step's end, and inside of it 'compile'
    of so many 'programs'.
    """
    log = workdir.parent / "output.log"
    environment = {
        **os.environ,
        compilation_cache.VARIABLE: str(programs),
        "JAX_LOG_COMPILES": "1",
        "PYTHONUNBUFFERED": "1",
    }
    (workdir / metrics.FILE).unlink(missing_ok=True)
    begun = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], env=environment, stdout=output, stderr=output
        )
        try:
            planned, ready = _wait(process, workdir, log, begun)
        finally:
            process.kill()
            process.wait()
    compiled = [float(seconds) for _, seconds in _COMPILED.findall(log.read_text())]
    return {
        "seconds": ready - begun,
        "imports": planned - begun,
        "set-up": ready - planned,
        "compile": sum(compiled),
        "programs": len(compiled),
        "metrics": [x for x in jsonlines.read(workdir / metrics.FILE) if x["step"] == 1],
    }


def _wait(process: Any, workdir: Path, log: Path, begun: float) -> tuple[float, float]:
    """When the run had its plan, and when its first step was done."""
    planned = 0.0
    file = workdir / history.FILE
    while time.time() < begun + _LIMIT:
        if not planned and "a device" in log.read_text():  # the last line of the plan
            planned = time.time()
        events = jsonlines.read(file) if file.exists() else []
        ready = [e["time"] for e in events if e["event"] == "ready" and e["time"] > begun]
        if ready and jsonlines.read(workdir / metrics.FILE):
            return planned, ready[0]
        if process.poll() is not None:
            raise UserError(f"The run ended before its first step:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
    raise UserError(f"No step within {_LIMIT:.0f} seconds:\n{log.read_text()[-3000:]}")


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` in lines."""
    lines = ["from the start of the process to the end of the first training step:"]
    for way in ("cold", "warm"):
        seconds, parts = found[way]["seconds"], found[way]["parts"]
        lines.append(
            f"  {way}: {seconds['median']:.1f} s ({seconds['least']:.1f} to {seconds['most']:.1f} "
            f"in {seconds['rounds']} rounds): imports and config {parts['imports']:.1f} s, set-up "
            f"and the step {parts['set-up']:.1f} s, of it compiling {parts['programs']} programs "
            f"{parts['compile']:.1f} s"
        )
    same = "are the same, bit by bit" if found["same"] else "DIFFER"
    return "\n".join([*lines, f"  the metrics of all first steps {same}"])


def require(found: dict[str, Any], cold: float | None, warm: float | None) -> None:
    """Raises UserError where the median start takes longer, or first steps are not the same."""
    for way, most in (("cold", cold), ("warm", warm)):
        took = found[way]["seconds"]["median"]
        if most is not None and took > most:
            raise UserError(f"A {way} start took {took:.1f} s, more than --require_{way}={most}.")
    if not found["same"]:
        raise UserError("The first steps of the starts differ.")
