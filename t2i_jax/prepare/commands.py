"""What launch/prepare.py runs: each command, and what it says when it is done."""

from etils import epath
import jax
from ml_collections import ConfigDict

from t2i_jax.data import sources
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError
from t2i_jax.prepare import index as indexing
from t2i_jax.prepare import inspect as inspecting
from t2i_jax.prepare import latents as encoding
from t2i_jax.prepare import published as merging

_SHOWN = 100  # damages that are printed
_PUBLISHED = {"cc12m": merging.cc12m, "sa1b": merging.sa1b, "journeydb": merging.journeydb}


def index(pattern: str, directory: str, workers: int | None) -> int:
    """Prints what the shards hold; 1 where one is damaged, else 0."""
    text, damaged = indexing.index(pattern, directory, workers)
    print(text)
    for shard, what in damaged[:_SHOWN]:
        print(f"DAMAGED {shard}, {what}")
    if damaged:
        count = len({shard for shard, _ in damaged})
        print(
            f"{count} shards are damaged: what is whole in them is used; better write them again."
        )
    return int(bool(damaged))


def index_run(config: ConfigDict) -> int:
    """Makes the indexes that a run of `config` needs, and with buckets the sizes of all images."""
    source = sources.make_source(config, "train")
    print(f"{len(source):,} training samples in {source.files:,} files")
    if config.data.buckets:
        size_N2 = source.sizes(config.data.index_dir, config.data.num_threads)
        known = int((size_N2 > 0).all(1).sum())
        print(f"sizes of images: {known:,} known, {len(size_N2) - known:,} cannot be read")
    for file, damage in source.damage[:_SHOWN]:
        print(f"DAMAGED {file}, bytes {damage.start:,} to {damage.stop:,}: {damage.reason}")
    return int(bool(source.damage))


def inspect(config: ConfigDict, out: epath.Path, step: int, samples: int) -> None:
    print(inspecting.inspect(config, out, step=step, samples=samples))


def latents(config: ConfigDict, out: str, batch_size: int) -> None:
    process = (jax.process_index(), jax.process_count())
    print(encoding.encode(config, out, batch_size=batch_size, process=process))


def tokenizer(config: ConfigDict, out: str, vocab_size: int | None, captions: int) -> None:
    """Trains on the training captions, shuffled by the seed. Raises ConfigError where one is."""
    if epath.Path(out).exists():
        raise ConfigError(f"--out={out} is there already; give another directory.")
    vocab_size = vocab_size or config.pretrain.vocab_size
    if not vocab_size:
        raise ConfigError("--vocab_size=... must be given: config.pretrain.vocab_size is 0.")
    source = sources.make_source(config, "train")
    made = Tokenizer.train(sources.captions(source, captions, config.seed), vocab_size)
    made.save(out)
    read = min(captions, len(source))
    print(f"{out}: {made.vocab_size} tokens, trained on {read:,} captions")


def published(name: str, images: str, captions: str, out: str, workers: int | None) -> None:
    print(_PUBLISHED[name](images, captions, out, workers=workers).describe())
