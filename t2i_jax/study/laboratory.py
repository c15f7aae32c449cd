"""Runs a suite: its parts, its trainings, its speeds; what is done already is not done again.

DIR/parts/         what the runs share
DIR/runs/ROW/      a training of each seed, as launch/train.py leaves one
DIR/logs/          what the processes said
DIR/speeds/        what was timed
DIR/chance_*.json  how often a prompt is satisfied by chance
DIR/results.jsonl  all findings, also where something failed
"""

from collections.abc import Iterator, Sequence
import contextlib
import fcntl
import json
from pathlib import Path

from t2i_jax import config as configs
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.study import facts, parts, pictures, queue, results, worker
from t2i_jax.study.board import Board
from t2i_jax.study.queue import Job
from t2i_jax.study.results import Entry
from t2i_jax.study.suite import Run, Suite
from t2i_jax.training.preemption import PreemptedError

_LOGGED = 12  # last lines of a log that are shown


def study(
    suite: Suite,
    workdir: Path,
    seeds: Sequence[int],
    *,
    rounds: int,
    parallel: int | None,
    board: Board,
) -> list[Entry]:
    """All findings of a suite, in its order; the file of them is in `workdir`.

    `rounds` is how often speeds are measured, 0: not at all; `parallel` is as of `queue.slots`.
    Raises UserError where processes failed, after all others have been run; PreemptedError where
    this one was asked to stop. Where there was an error, the file of findings is written, too.
    """
    runs = suite.runs(seeds)
    with _alone(workdir):
        places = queue.slots(parallel)
        try:
            _make_parts(runs, workdir, places, board)
            _train(runs, workdir, places, board)
            _draw(suite.runs(seeds[:1]), workdir, places, board)
            if rounds:
                _time(suite, workdir, places[:1], rounds, board)
        except PreemptedError:
            raise  # at once
        except UserError:
            results.write(workdir / results.NAME, findings(suite, workdir, seeds, rounds))
            raise
        entries = findings(suite, workdir, seeds, rounds)
        results.write(workdir / results.NAME, entries)
    return entries


def findings(suite: Suite, workdir: Path, seeds: Sequence[int], rounds: int) -> list[Entry]:
    """What is known, in the suite's order."""
    runs = suite.runs(seeds)
    entries = [facts.of_suite(suite, seeds, facts.chance(suite, workdir))]
    entries += [facts.of_row(run) for run in suite.runs(seeds[:1])]
    by_row = sorted(runs, key=lambda run: [row.name for row in suite.rows].index(run.row.name))
    found = [results.of_run(run, workdir / run.folder) for run in by_row]
    entries += [entry for entry in found if entry]
    file = _asked(suite, workdir, rounds).with_suffix(".found.json") if rounds else None
    if file and file.exists():
        entries += json.loads(file.read_text())
    return [*entries, facts.of_machines([workdir / run.folder for run in by_row])]


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """No other process runs a suite there."""
    if "gs:" in workdir.parts:
        raise ConfigError(f"--workdir={workdir}: a suite of small runs needs a local directory.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{workdir}: another process runs a suite there.") from error
            yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error}.") from error


def _make_parts(runs: Sequence[Run], workdir: Path, places, board: Board) -> None:
    needed = parts.unique(part for run in runs for part in run.needs)
    jobs = []
    for part in needed:
        out = workdir / parts.FOLDER / part.name
        if out.exists():
            continue
        out.parent.mkdir(exist_ok=True)
        out.with_name(f"{part.name}.json").write_text(configs.to_json(part.config))
        jobs.append(Job(part.name, worker.command("part", out), workdir / f"logs/{part.name}.log"))
    board.say(f"parts: {len(needed)} shared by the runs, {len(jobs)} to be made")
    for done in queue.run(jobs, places):
        if done.status:
            raise UserError(f"{done.job.name} was not made.\n{_tail(done.job.log)}")
        board.say(f"  made {done.job.name} in {done.seconds:.0f} s")


def _train(runs: Sequence[Run], workdir: Path, places, board: Board) -> None:
    jobs, by_log = [], {}
    for run in runs:
        folder = workdir / run.folder
        if entry := results.of_run(run, folder):
            board.known(run, entry)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / parts.CONFIG).write_text(configs.to_json(run.config))
        log = workdir / f"logs/{run.row.name}-seed_{run.seed}.log"
        jobs.append(Job(run.name, worker.command("run", folder), log))
        by_log[log] = run
    board.begin(len(jobs), len(places))
    failed = []
    for done in queue.run(jobs, places):
        run = by_log[done.job.log]
        entry = results.of_run(run, workdir / run.folder)
        if entry is None or done.status not in (0, worker.EXIT_FAILED):
            failed.append(done)
            board.failed(run, done)
            continue
        board.done(run, entry, done.seconds)
    board.end()
    if failed:
        names = ", ".join(done.job.name for done in failed)
        raise UserError(
            f"{len(failed)} runs ended with an error: {names}. Start again to try these again. "
            f"The last lines of the first, from {failed[0].job.log}:\n{_tail(failed[0].job.log)}"
        )


def _draw(runs: Sequence[Run], workdir: Path, places, board: Board) -> None:
    """Pictures by every row, of the first seed."""
    jobs = []
    for run in runs:
        folder = workdir / run.folder
        wanted = run.config.sampling.prompts and not (folder / pictures.STRIP).exists()
        if wanted and (folder / "checkpoints").exists() and not (folder / worker.FAILED).exists():
            log = workdir / f"logs/{run.row.name}-pictures.log"
            jobs.append(Job(run.name, worker.command("pictures", folder), log))
    if jobs:
        board.say(f"pictures: {len(jobs)} rows, the same prompts and noise")
    for done in queue.run(jobs, places):
        if done.status:
            raise UserError(f"{done.job.name}: no pictures.\n{_tail(done.job.log)}")


def _asked(suite: Suite, workdir: Path, rounds: int) -> Path:
    """The file that says what is to be timed."""
    rows = {run.row.name: run.config.to_dict() for run in suite.runs([suite.base.seed])}
    text = json.dumps({"rounds": rounds, "rows": rows})
    return workdir / "speeds" / f"{parts.digest({'asked': text})}.json"


def _time(suite: Suite, workdir: Path, places, rounds: int, board: Board) -> None:
    file = _asked(suite, workdir, rounds)
    if file.with_suffix(".found.json").exists():
        return
    file.parent.mkdir(exist_ok=True)
    rows = {run.row.name: run.config.to_dict() for run in suite.runs([suite.base.seed])}
    file.write_text(json.dumps({"rounds": rounds, "rows": rows}))
    board.say("speeds: training and sampling of every row, in turns, on one device")
    job = Job("speeds", worker.command("speeds", file), workdir / "logs/speeds.log")
    for done in queue.run([job], places):
        if done.status:
            raise UserError(f"The speeds were not measured.\n{_tail(done.job.log)}")
        board.say(f"  measured in {done.seconds:.0f} s")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LOGGED:])
