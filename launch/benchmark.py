"""Speed, measured here and now (docs/performance.md).

  train --config=...      the training step, on random weights and synthetic batches [--latents]
  sample --config=...     prompts to pictures [--batch_size=8 --steps=25]; with --recompute also
                          without the text memory
  vae --config=...        the autoencoder, both ways [--batch_size=1]
  step                    the training step beside the same mathematics by hand [--sizes=small]
  startup --config=...    from the start of launch/train.py to its first step, cold and warm
  data                    images a second of a core, beside bare decoding [--decoders]

python launch/benchmark.py train --config=configs/scenes.py [--rounds=5] [--out=figures.json]
"""

import json
import os
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags
import jax
from ml_collections.config_flags import config_flags

from t2i_jax import cli, compilation_cache
from t2i_jax import config as configs

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
OUT = flags.DEFINE_string("out", None, "A JSON file to write the figures to.")
ROUNDS = flags.DEFINE_integer("rounds", None, "Times that everything is measured.", 1)
LATENTS = flags.DEFINE_bool("latents", False, "train: batches of stored latents.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "sample, vae: images at once.", 1)
STEPS = flags.DEFINE_integer("steps", None, "sample: Euler steps.", 1)
RECOMPUTE = flags.DEFINE_bool("recompute", False, "sample: also without the text memory.")
SIZES = flags.DEFINE_list("sizes", ["small", "medium", "large"], "step: which.")
COUNT = flags.DEFINE_integer("count", 24, "data: images of each size.", 1)
REQUIRE = flags.DEFINE_float("require", None, "step: fail where the ratio is above this.", 0)
COLD = flags.DEFINE_float("require_cold", None, "startup: seconds that a cold start may take.", 0)
WARM = flags.DEFINE_float("require_warm", None, "startup: likewise a warm one.", 0)
DECODERS = flags.DEFINE_bool("decoders", False, "data: other decoders, too, if installed.")
cli.define_process_flags()
COMMANDS = {"train": 5, "sample": 5, "vae": 5, "step": 15, "startup": 2, "data": 5}  # and rounds


def measure(command, rounds):
    """(The figures in lines, the same as a tree.)"""
    from t2i_jax.speed import autoencoder, data, sample, startup, step, train

    config, batch = CONFIG.value, BATCH_SIZE.value
    script = [sys.executable, str(Path(__file__).resolve().with_name("train.py"))]
    script += [f"--{flag}={value}" for flag, value in cli.config_arguments("config", sys.argv)]
    steps = {"batch_size": batch, "steps": STEPS.value, "recompute": RECOMPUTE.value}
    module, way = {
        "train": (train, lambda: train.measure(config, rounds, latents=LATENTS.value)),
        "sample": (sample, lambda: sample.measure(config, rounds, **steps)),
        "vae": (autoencoder, lambda: autoencoder.measure(config, rounds, batch)),
        "step": (step, lambda: step.measure(rounds, SIZES.value)),
        "startup": (startup, lambda: startup.measure(script, rounds)),
        "data": (data, lambda: data.measure(rounds, COUNT.value, DECODERS.value)),
    }[command]
    found = way()
    return module.describe(found), found


def main(argv):
    from t2i_jax.speed import startup, step

    command, *words = argv[1:] or [""]
    cli.check_command(command, words, {name: [] for name in COMMANDS})
    if command not in ("step", "data"):
        cli.require(config=CONFIG.value)
    if command == "step":
        cli.require(sizes=SIZES.value)
    if command in ("startup", "data"):
        cli.refuse("coordinator", "num_processes", "process_id", where=command)
    out = cli.output(OUT.value, ".json") if OUT.value else None
    if command == "train":  # what it says of compiling is not to be said of loading
        os.environ.setdefault(compilation_cache.VARIABLE, "")
    if command not in ("startup", "data"):
        same = {} if CONFIG.value is None else configs.flat(CONFIG.value)
        cli.start_processes({"command": command, "rounds": ROUNDS.value, **same})
    text, found = measure(command, ROUNDS.value or COMMANDS[command])
    if jax.process_index() == 0:
        print(text)
        if out is not None:
            out.write_text(json.dumps(found, indent=2))
    if command == "step" and REQUIRE.value is not None:
        step.require(found, REQUIRE.value)
    if command == "startup":
        startup.require(found, COLD.value, WARM.value)


if __name__ == "__main__":
    cli.run(main, commands=True)
