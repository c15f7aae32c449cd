"""Trains a model: python launch/train.py --config=configs/scenes.py [--workdir=DIR].

Prints the plan, says what is missing, and trains; run again, it goes on from the newest checkpoint.
Any key of the config can be set: --config.train.steps=2000. On several hosts, the same on each.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t2i_jax.training import preemption

preemption.exit_at_once()  # before all that takes a while to be imported

from absl import flags  # noqa: E402
from ml_collections.config_flags import config_flags  # noqa: E402

from t2i_jax import cli  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<config.name>.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
flags.mark_flag_as_required("config")
cli.define_process_flags()


def main(_):
    from t2i_jax import config as configs
    from t2i_jax import plan, sharding
    from t2i_jax.training import loop

    config = CONFIG.value
    workdir = WORKDIR.value or f"runs/{config.name}"
    cli.start_processes({"--workdir": workdir, **configs.flat(config)})
    if DRY_RUN.value:
        print(plan.describe(config, workdir, sharding.make_mesh(**config.mesh)))
    else:
        loop.train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
