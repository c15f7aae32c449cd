"""Trains and compares designs: python launch/study.py --suite=paper_small --workdir=runs/study.

Every row of a suite (configs/suites/, or a file of your own: docs/laboratory.md) is trained with
every seed on the devices at hand; then speeds are measured and the report is written. Run again, it
goes on where it ended. --suite=paper_full prints the published runs, and what they cost.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t2i_jax.training import preemption

preemption.exit_at_once()  # before all that takes a while to be imported

from absl import flags  # noqa: E402

from t2i_jax import cli  # noqa: E402
from t2i_jax.errors import ConfigError  # noqa: E402

SUITE = flags.DEFINE_string("suite", None, "A name in configs/suites/, or a .py file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where all of it lives; default: runs/<suite>.")
ONLY = flags.DEFINE_list("only", [], "Rows of the suite; default: all.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every row.")
STEPS = flags.DEFINE_integer("steps", None, "Training steps; default: the suite's.", 1)
PARALLEL = flags.DEFINE_integer("parallel", None, "Runs at a time; default: one a device.", 1)
ROUNDS = flags.DEFINE_integer("speed_rounds", 15, "Rounds of timing; 0: speeds are left out.", 0)
OUT = flags.DEFINE_string("out", None, "The report, .md; default: study.md in the workdir.")
RESULTS = flags.DEFINE_string("results", None, "Write the report of this file; run nothing.")
# Of suites of published configs.
LAUNCH = flags.DEFINE_bool("launch", False, "Train them, one after the other; on every host.")
CHIP = flags.DEFINE_string("chip", "v4", "The device that hours are told of.")
DEVICES = flags.DEFINE_integer("devices", 128, "How many; 128 of v4 are a v4-256.", 1)
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak that a step is assumed to reach.", 0.01, 1)
cli.define_process_flags()
PROCESS = ("coordinator", "num_processes", "process_id", "start_timeout")
PUBLISHED = ("launch", "chip", "devices", "mfu", *PROCESS)
SMALL = ("seeds", "speed_rounds", "parallel", "out")


def main(_):
    from t2i_jax.study import commands

    if RESULTS.value:
        cli.refuse("suite", "workdir", "only", "steps", *SMALL[:3], *PUBLISHED, where="--results")
        return commands.again(RESULTS.value, OUT.value)
    if not SUITE.value:
        raise ConfigError("--suite=... must be given: paper_small, paper_full or a .py file.")
    given = {name: flags.FLAGS[name] for name in PROCESS if flags.FLAGS[name].present}
    options = commands.Options(
        only=ONLY.value,
        seeds=SEEDS.value,
        steps=STEPS.value,
        rounds=ROUNDS.value,
        parallel=PARALLEL.value,
        out=OUT.value,
        launch=LAUNCH.value,
        chip=CHIP.value,
        devices=DEVICES.value,
        mfu=MFU.value,
        arguments=[f"--{name}={flag.value}" for name, flag in given.items()],
    )
    published = commands.is_published(SUITE.value)
    cli.refuse(*(SMALL if published else PUBLISHED), where=f"--suite={SUITE.value}")
    return commands.study(SUITE.value, WORKDIR.value, options)


if __name__ == "__main__":
    cli.run(main)
