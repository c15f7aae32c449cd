"""Compiles what a run does for a TPU that is not here, and says whether it fits.

python launch/compile.py --config=configs/fusion_2b.py --topology=v4-256 [--out=report.json]
    The training step. --what=sample: drawing sampling.batch_size images.
python launch/compile.py --config=configs/fusion_2b.py --topology=v6e-64 --sweep
    The largest batch that fits, for every remat policy, to one row a device.
python launch/compile.py --table=docs/tpu.md --jobs=2 [--only=REGEX]
    All of it: the table of what fits where, written into that page, and beside it as JSON.

No TPU is needed, only its compiler: pip install -e ".[tpu]". Any key of the config can be set, as
--config.dit.remat=full. A topology is a name (--topology=list prints them), one spelled out
(v5p:2x2x4), or several slices (v5e-256*2).
"""

import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags
from ml_collections.config_flags import config_flags

from t2i_jax import cli, machines

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
TOPOLOGY = flags.DEFINE_string("topology", None, "The machine; 'list' prints the names.")
WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "What is compiled.")
LATENTS = flags.DEFINE_bool("latents", False, "train: batches of stored latents, of prepare.py.")
SWEEP = flags.DEFINE_bool("sweep", False, "train: batch by batch, policy by policy of dit.remat.")
TABLE = flags.DEFINE_string("table", None, "The page whose table is made again.")
ONLY = flags.DEFINE_string("only", "", "table: rows whose names match; others stay as they are.")
JOBS = flags.DEFINE_integer("jobs", 1, "table: machines that are compiled for at once.", 1)
OUT = flags.DEFINE_string("out", None, "A JSON file to write the report to.")


def main(_):
    if TABLE.value:
        return make_table(Path(TABLE.value))
    if TOPOLOGY.value == "list":
        return print("\n".join(machines.NAMES))
    cli.require(config=CONFIG.value, topology=TOPOLOGY.value)
    if WHAT.value == "sample":
        cli.refuse("sweep", "latents", where="--what=sample")
    out = cli.output(OUT.value, ".json") if OUT.value else None
    report, text = sweep() if SWEEP.value else one()
    print(text)
    if out is not None:
        out.write_text(json.dumps(report, indent=2))


def one():
    """The report on one program, and as text."""
    from t2i_jax.speed import compile as compiler
    from t2i_jax.speed import tables

    if WHAT.value == "sample":
        report = compiler.sample(CONFIG.value, TOPOLOGY.value)
    else:
        report = compiler.train(CONFIG.value, TOPOLOGY.value, latents=LATENTS.value)
    return report, tables.describe(report)


def sweep():
    """The reports of all that was tried, and what to take from them."""
    from t2i_jax.speed import sweep as sweeping

    found = sweeping.sweep(CONFIG.value, TOPOLOGY.value, latents=LATENTS.value)
    return found, sweeping.describe(found)


def make_table(page):
    """Compiles the rows that --only names, and writes page and JSON after each machine."""
    from t2i_jax.speed import fleet

    rows, kept = fleet.choose(ONLY.value), page.with_suffix(".json")
    reports = json.loads(kept.read_text()) if kept.is_file() else {}
    fleet.rewrite(page, fleet.table(reports))  # before hours of work: it can be written
    for new in fleet.run(rows, JOBS.value):
        reports |= new
        reports = {row.name: reports[row.name] for row in fleet.ROWS if row.name in reports}
        kept.write_text(json.dumps(reports, indent=1) + "\n")
        fleet.rewrite(page, fleet.table(reports))


if __name__ == "__main__":
    cli.run(main)
