"""What a suite does in a process of its own, on one device:

    python -m t2i_jax.study.worker run DIR       trains by DIR/study.json, as launch/train.py does
    python -m t2i_jax.study.worker pictures DIR  draws by what was trained there
    python -m t2i_jax.study.worker part DIR      makes a part (parts.py) by DIR.json
    python -m t2i_jax.study.worker speeds FILE   times the configs of FILE (speeds.py)

Paths of parts in configs are relative to the suite's directory. A worker ends with what asked for
it: it watches its standard input, which closes when that process is gone, however it ended.
"""

import json
import os
from pathlib import Path
import sys
import threading

from t2i_jax.training import preemption

FAILED = "failed.txt"  # in a run's directory: why it can never end
EXIT_FAILED = 4  # a run diverges, and would again


def run(folder: Path) -> int:
    """Trains; returns the exit status."""
    from t2i_jax.study import facts, parts
    from t2i_jax.training import loop
    from t2i_jax.training.watch import NonFiniteError

    facts.note_maker(folder)
    try:
        loop.train(parts.located(parts.read(folder), _root(folder)), folder)
    except NonFiniteError as error:
        (folder / FAILED).write_text(str(error))
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return 0


def _root(folder: Path) -> Path:
    """The suite's directory of a run's, ROOT/runs/ROW/SEED."""
    return folder.parent.parent.parent


def pictures(folder: Path) -> int:
    """Draws."""
    from t2i_jax.study import pictures

    pictures.draw(folder, _root(folder))
    return 0


def part(folder: Path) -> int:
    """Makes a part."""
    from t2i_jax import config as configs
    from t2i_jax.study import making, parts

    text = folder.with_name(f"{folder.name}.json").read_text()
    making.make(parts.Part(folder.name.split("-")[0], configs.from_json(text)), folder)
    return 0


def speeds(file: Path) -> int:
    """Times rows; the findings are beside the file."""
    from t2i_jax import config as configs
    from t2i_jax.study import speeds

    asked = json.loads(file.read_text())
    rows = {name: configs.from_json(json.dumps(row)) for name, row in asked["rows"].items()}
    found = speeds.measure(rows, asked["rounds"])
    new = file.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.replace(file.with_suffix(".found.json"))
    return 0


KINDS = {"run": run, "pictures": pictures, "part": part, "speeds": speeds}


def main(kind: str, path: str) -> int:
    """Does it; returns the exit status."""
    preemption.exit_at_once()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from t2i_jax import compilation_cache
    from t2i_jax.errors import UserError

    compilation_cache.enable()
    try:
        return KINDS[kind](Path(path))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _leave_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written; it ends with the process at the other end
        pass
    os._exit(1)


def command(kind: str, path: Path) -> list[str]:
    """What starts it."""
    return [sys.executable, "-m", "t2i_jax.study.worker", kind, str(path)]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
