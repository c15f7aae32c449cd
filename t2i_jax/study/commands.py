"""What launch/study.py does."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import jax

from t2i_jax.errors import ConfigError, UserError
from t2i_jax.study import controls, full, laboratory, pictures, report, results
from t2i_jax.study import suite as suites
from t2i_jax.study.board import Board
from t2i_jax.study.findings import Findings


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of launch/study.py say; `arguments` are flags for every published training."""

    only: Sequence[str] = ()
    seeds: Sequence[str] = ("0", "1", "2")
    steps: int | None = None
    rounds: int = 15
    parallel: int | None = None
    out: str | None = None
    launch: bool = False
    chip: str = "v4"
    devices: int = 128
    mfu: float = 0.4
    arguments: Sequence[str] = ()


def is_published(name: str) -> bool:
    """Whether a suite is of published configs."""
    return isinstance(suites.load(name), suites.Published)


def study(name: str, workdir: str | None, options: Options) -> None:
    """Runs a suite and writes its report; prints, or starts, one of published configs."""
    jax.config.update("jax_platforms", "cpu")  # devices are those of other processes
    suite = suites.load(name)
    root = workdir or f"runs/{suite.name}"
    if isinstance(suite, suites.Published):
        full.main(suite, root, options)
    else:
        _run(suite.shortened(options.steps).only(options.only), Path(root), options)


def _run(suite: suites.Suite, folder: Path, options: Options) -> None:
    """Raises UserError where a control came out wrong, when all is written."""
    seeds = _seeds(options.seeds)
    page, folder = Path(options.out or folder / "study.md"), folder.absolute()
    _check(page)
    board = Board(suite, seeds)
    entries = laboratory.study(
        suite, folder, seeds, rounds=options.rounds, parallel=options.parallel, board=board
    )
    findings = Findings(entries)
    runs = {run.row.name: folder / run.folder for run in suite.runs(seeds[:1])}
    prompts = list(suite.base.sampling.prompts)
    pictures.sheet(findings, runs, prompts, page.parent / page.stem / report.SHEET)
    report.write(entries, page)
    board.say(f"The report is {page}, the findings are in {folder / results.NAME}")
    if wrong := [c.text for c in controls.check(findings) if not c.passed]:
        raise UserError("A control came out wrong; believe nothing else:\n" + "\n".join(wrong))


def again(path: str, out: str | None) -> None:
    """Writes the report of findings that are there. Raises UserError where these are none."""
    page = Path(out or Path(path).parent / "study.md")
    _check(page)
    try:
        report.write(results.read(path), page)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--results={path}: {error}") from error
    print(f"The report is {page}")


def _check(page: Path) -> None:
    if page.suffix != ".md":
        raise ConfigError(f"--out={page} must end in .md.")
    page.parent.mkdir(parents=True, exist_ok=True)


def _seeds(words: Sequence[str]) -> list[int]:
    try:
        seeds = [int(word) for word in words]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={','.join(words)} must be different numbers like 0,1,2.")
    return seeds
