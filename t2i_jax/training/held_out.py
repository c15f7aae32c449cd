"""Held-out samples of a run: which are looked at, in batches and one by one."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from t2i_jax import sharding
from t2i_jax.data import loader, sources
from t2i_jax.data.samples import Row
from t2i_jax.training.parts import Parts


def validation_sizes(count: int, batch_size: int, shards: int) -> list[int]:
    """Rows of the validation batches: full ones, and a last one that divides over the shards."""
    full = batch_size - batch_size % shards
    rest = count % full - count % full % shards
    return [full] * (count // full) + [rest] * (rest > 0)


def validation_samples(config: ConfigDict, source: sources.Mixture) -> list[int]:
    """The held-out samples that are looked at: all; of stored latents, those of the square."""
    if not config.data.buckets or not source.stored:
        return list(range(len(source)))
    return [i for i in range(len(source)) if set(source.size(i)) == {config.data.image_size}]


def batches(parts: Parts) -> Iterator[loader.Batch]:
    """The held-out samples in order, this process's rows of each batch."""
    samples = validation_samples(parts.config, parts.validation_source)
    shards, made = sharding.batch_shards(parts.mesh), _loader(parts)
    for size in validation_sizes(len(samples), parts.config.train.batch_size, shards):
        yield made.fixed_batch([samples[r] for r in sharding.local_rows(parts.mesh, size)])
        samples = samples[size:]


def rows(parts: Parts, count: int) -> list[Row]:
    """The first held-out samples with their captions, `count` of them or all."""
    samples, made = validation_samples(parts.config, parts.validation_source), _loader(parts)
    return [made.fixed_row(i) for i in samples[:count]]


def _loader(parts: Parts) -> loader.Loader:
    data = parts.config.data.copy_and_resolve_references().unlock()
    data.buckets = ()  # all are of the square
    prompts, seed = parts.pipeline.prompts, parts.config.seed
    return loader.Loader(parts.validation_source, prompts, data, 1, seed)
