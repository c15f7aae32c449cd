"""Speed, measured here and now.

python launch/benchmark.py data [--decoders] [--out=data.json]
    Images a second of a core through the loader, beside bare decoding and resizing.
"""

import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

OUT = flags.DEFINE_string("out", None, "A JSON file to write the figures to.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that everything is measured.", 1)
COUNT = flags.DEFINE_integer("count", 24, "data: images of each size.", 1)
DECODERS = flags.DEFINE_bool("decoders", False, "data: other decoders, too, if installed.")


def main(argv):
    from t2i_jax.speed import data

    command, *words = argv[1:] or [""]
    cli.check_command(command, words, {"data": []})
    out = cli.output(OUT.value, ".json") if OUT.value else None
    found = data.measure(ROUNDS.value, COUNT.value, DECODERS.value)
    print(data.describe(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    cli.run(main, commands=True)
