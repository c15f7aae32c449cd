"""Data before training.

python launch/prepare.py index --data='DIR/*.tar'
    Makes and verifies the indexes of WebDataset shards; the status is 1 where one is damaged.
    With --config instead of --data: all that a run of it needs, sizes of images for buckets too.
python launch/prepare.py inspect --config=configs/small_64.py --out=sheet.png
    A contact sheet of a batch as the model will see it, and statistics of the data.
python launch/prepare.py latents --config=configs/fusion_2b.py --out=DIR
    Encodes the data once; train with --config.data.source=latents --config.data.path=DIR.
python launch/prepare.py tokenizer --config=configs/small_64.py --out=DIR
    Trains a tokenizer on the captions of the data.
python launch/prepare.py cc12m|sa1b|journeydb --images=... --captions=... --out=DIR
    Merges a published data set with its captions into shards (docs/data.md).

A command that was stopped, started again, goes on.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags
from ml_collections.config_flags import config_flags

from t2i_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's: not for published sets.")
DATA = flags.DEFINE_string("data", None, "index: shards, as config.data.path.")
OUT = flags.DEFINE_string("out", None, "The file or directory to make.")
INDEX_DIR = flags.DEFINE_string("index_dir", "", "index: where to; default: beside the shards.")
IMAGES = flags.DEFINE_string("images", None, "cc12m, sa1b, journeydb: archives or a folder.")
CAPTIONS = flags.DEFINE_string("captions", None, "cc12m, sa1b, journeydb: their captions.")
WORKERS = flags.DEFINE_integer("workers", None, "index, cc12m, ...: processes; default: cores.")
STEP = flags.DEFINE_integer("step", 0, "inspect: the batch of this step.", lower_bound=0)
SAMPLES = flags.DEFINE_integer("samples", 1000, "inspect: samples of the statistics.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "latents: images encoded at once.", 1)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "tokenizer: tokens; default: config.pretrain.vocab_size.", 260
)
NUM_CAPTIONS = flags.DEFINE_integer("num_captions", 100_000, "tokenizer: captions read.", 1)
_PUBLISHED = ("cc12m", "sa1b", "journeydb")


def main(argv):
    from t2i_jax.errors import users_files
    from t2i_jax.prepare import commands

    command, *words = argv[1:] or [""]
    known = ("index", "inspect", "latents", "tokenizer", *_PUBLISHED)
    cli.check_command(command, words, {name: [] for name in known})
    with users_files():
        if command == "index":
            if CONFIG.value is not None:
                sys.exit(commands.index_run(CONFIG.value))
            cli.require(data=DATA.value)
            sys.exit(commands.index(DATA.value, INDEX_DIR.value, WORKERS.value))
        if command in _PUBLISHED:
            cli.require(images=IMAGES.value, captions=CAPTIONS.value, out=OUT.value)
            places = IMAGES.value, CAPTIONS.value, OUT.value
            return commands.published(command, *places, WORKERS.value)
        cli.require(config=CONFIG.value, out=OUT.value)
        if command == "inspect":
            out = cli.output(OUT.value, ".png")
            return commands.inspect(CONFIG.value, out, STEP.value, SAMPLES.value)
        if command == "latents":
            return commands.latents(CONFIG.value, OUT.value, BATCH_SIZE.value)
        commands.tokenizer(CONFIG.value, OUT.value, VOCAB_SIZE.value, NUM_CAPTIONS.value)


if __name__ == "__main__":
    cli.run(main, commands=True)
