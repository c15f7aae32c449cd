"""Trains and compares designs: python launch/study.py --suite=paper_small --workdir=runs/study.

Every row of a suite (configs/suites/, or a file of your own: docs/study.md) is trained with every
seed on the devices at hand; then its speeds are measured and the report is written. Run again, it
goes on where it ended. --suite=paper_full prints the published runs and what they cost.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

SUITE = flags.DEFINE_string("suite", None, "A name in configs/suites/, or a .py file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where all of it lives; default: runs/<suite>.")
ONLY = flags.DEFINE_list("only", [], "Rows to run, of those of the suite; default: all.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every row.")
STEPS = flags.DEFINE_integer("steps", None, "Training steps; default: the suite's.", 1)
ROUNDS = flags.DEFINE_integer("speed_rounds", 15, "Rounds of timing; 0 = none.", 0)
OUT = flags.DEFINE_string("out", None, "The report, as Markdown; default: <workdir>/study.md.")
flags.mark_flag_as_required("suite")


def main(_):
    from t2i_jax.study import commands

    commands.main(
        SUITE.value,
        WORKDIR.value,
        only=ONLY.value,
        seeds=SEEDS.value,
        steps=STEPS.value,
        rounds=ROUNDS.value,
        out=OUT.value,
    )


if __name__ == "__main__":
    cli.run(main)
