"""Compiles the training step for a TPU that is not here, and says whether it fits.

python launch/compile.py --config=configs/fusion_2b.py --topology=v4-256 [--out=report.json]

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
LATENTS = flags.DEFINE_bool("latents", False, "Batches of stored latents, as of prepare.py.")
OUT = flags.DEFINE_string("out", None, "A JSON file to write the report to.")
flags.mark_flag_as_required("topology")


def main(_):
    from t2i_jax.speed import compile as compiler
    from t2i_jax.speed import tables

    if TOPOLOGY.value == "list":
        print("\n".join(machines.NAMES))
        return
    cli.require(config=CONFIG.value)
    out = cli.output(OUT.value, ".json") if OUT.value else None
    report = compiler.train(CONFIG.value, TOPOLOGY.value, latents=LATENTS.value)
    print(tables.describe(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    cli.run(main)
