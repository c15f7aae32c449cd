"""Batches whose content depends on (seed, step) alone.

A host makes those rows of every global batch that its devices hold (sharding.local_rows); which
samples these are is `order`'s to say. The step is the whole state of the input pipeline: any batch
is reached directly, and neither the number of hosts nor that of threads or worker processes changes
a pixel.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any, NamedTuple
import weakref

from absl import flags
import grain
from ml_collections import ConfigDict
import numpy as np

from t2i_jax.data import buckets, order, sources
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.samples import Fault, Row, Samples
from t2i_jax.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]
_FAULTS = "faults"  # JSON, as bytes: arrays are what passes between processes
_CAUSES = {str(cause): i for i, cause in enumerate(Cause)}


class Batch(NamedTuple):
    """One host's rows of a batch, and which samples could not be used for it."""

    arrays: Arrays
    faults: tuple[Fault, ...]


class Loader:
    """Shuffled training batches of one host, endlessly, from any step.

    Arrays are {'image': uint8 (b, H, W, 3), 'ids': int32 (b, T), 'mask': bool (b, T), 'bad': int32
    (b, causes), ...}, where b are the `rows` of this host (default: all), 'bad' counts the samples
    that each row took before a good one, and all but the first (and it) is what `prompts` makes of
    the captions. `data` is the config's data section.

    Attributes:
      digest: of what decides the order; the same on every host.
      left_out: faults of the samples that belong to no bucket: their size is not known.
    """

    def __init__(
        self,
        source: sources.Source,
        prompts: Prompts,
        data: ConfigDict,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        rows = range(batch_size) if rows is None else rows
        if not rows or not set(rows) <= set(range(batch_size)):
            raise ValueError(f"rows {list(rows)} of a batch of train.batch_size={batch_size}")
        self._threads, self._workers = data.num_threads, data.num_workers
        self._ahead = data.prefetch
        self._rows = len(rows)
        parts = getattr(source, "parts", [order.Part(0, len(source), 1.0)])
        self._shapes, bucket_N, self.left_out = _buckets(source, data, batch_size)
        seen = source.fingerprint.encode() + (b"" if bucket_N is None else bucket_N.tobytes())
        self.digest = hashlib.blake2b(seen, digest_size=16).digest()
        self._order = order.Order(parts, batch_size, seed, bucket_N, len(self._shapes))
        samples = Samples(source, data, self._order, batch_size, seed)
        shape = functools.partial(_shape, self._order, self._shapes)
        self._maker = _Maker(samples, prompts, shape, rows)
        self._square = (data.image_size, data.image_size)
        self._open: weakref.WeakSet[_Batches] = weakref.WeakSet()

    def indices(self, step: int) -> list[int]:
        """The samples of this host's rows at `step`, as they are meant to be."""
        return [self._maker.samples.index(step, row) for row in self._maker.rows]

    def shape(self, step: int) -> tuple[int, int]:
        """(height, width) of the images at `step`."""
        return _shape(self._order, self._shapes, step)

    def batch(self, step: int) -> Batch:
        """The batch of this host at `step`, made on the spot."""
        return _joined([self._maker.part(step, 0, self._rows)])

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, made ahead. Close it, or the loader."""
        workers = max(1, self._workers)
        threads = -(-self._threads // workers)
        # Parts of batches, as many as keep all threads busy with no more than `ahead` batches.
        parts = min(self._rows, max(1, -(-self._threads // max(1, self._ahead))))
        dataset = grain.MapDataset.range(start_step * parts, sys.maxsize)
        dataset = dataset.map(functools.partial(self._maker.numbered, parts))
        buffer = -(-self._ahead * parts // workers)
        dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, buffer))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # by a program that has no flags: grain has some
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._workers, max(1, buffer))
            dataset = dataset.mp_prefetch(options, _end_with_parent)
        batches = _Batches(iter(dataset), parts, copy=self._workers > 0)
        self._open.add(batches)
        return batches

    def fixed_batch(self, indices: Sequence[int]) -> Batch:
        """The samples `indices` of the source: nothing dropped or mirrored, cropped centrally."""
        rows = (self._maker.samples.fixed(index, self._square) for index in indices)
        return _joined([self._maker.arrays(rows, len(indices))])

    def fixed_row(self, index: int) -> Row:
        """One of `fixed_batch`, with its caption as it is."""
        return self._maker.samples.fixed(index, self._square)

    def close(self) -> None:
        """Stops the threads and processes of all iterators."""
        for batches in list(self._open):
            batches.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class _Batches(Iterator[Batch]):
    """Batches, each of `parts` elements of a dataset.

    With `copy`, their arrays are taken out of the memory that worker processes share, so that it is
    free again at once, and nothing of it is left when the program ends.
    """

    def __init__(self, iterator: Any, parts: int, copy: bool):
        self._iterator, self._parts, self._copy = iterator, parts, copy

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("These batches are closed.")
        batch = _joined([next(self._iterator) for _ in range(self._parts)])
        if self._copy and self._parts == 1:
            return batch._replace(arrays={k: np.array(v) for k, v in batch.arrays.items()})
        return batch

    def close(self) -> None:
        """Stops its threads and processes; a second call does nothing."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __del__(self):
        self.close()


def _shape(order_: order.Order, shapes, step: int) -> tuple[int, int]:
    return shapes[order_.bucket(step)[0]]


class _Maker:
    """Makes parts of batches; what worker processes are sent."""

    def __init__(self, samples: Samples, prompts: Prompts, shape, rows: Sequence[int]):
        self.samples, self._prompts, self._shape, self.rows = samples, prompts, shape, rows

    def part(self, step: int, first: int, last: int) -> Arrays:
        """Rows `first` to `last` of this host's batch at `step`."""
        shape = self._shape(step)
        rows = self.rows[first:last]
        return self.arrays((self.samples.read(step, row, shape) for row in rows), len(rows))

    def numbered(self, parts: int, number: int) -> Arrays:
        """Part `number` of all parts of all batches, `parts` to a batch."""
        step, k = divmod(number, parts)
        count = len(self.rows)
        return self.part(step, k * count // parts, (k + 1) * count // parts)

    def arrays(self, rows: Iterable[Row], count: int) -> Arrays:
        """`count` rows, each copied as soon as it is made, while it is in the processor's cache."""
        arrays: Arrays = {"bad": np.zeros((count, len(Cause)), np.int32)}
        captions, faults = [], []
        for i, row in enumerate(rows):
            for name, array in row.arrays.items():
                if name not in arrays:
                    arrays[name] = np.empty((count, *array.shape), array.dtype)
                arrays[name][i] = array
            for fault in row.faults:
                arrays["bad"][i, _CAUSES[fault.cause]] += 1
            captions.append(row.caption)
            faults += row.faults
        text = np.frombuffer(json.dumps(faults).encode(), np.uint8)
        return {**arrays, **self._prompts.encode(captions), _FAULTS: text}


def _end_with_parent(*_) -> None:
    """In a worker: ends it when its parent is gone, killed perhaps, and asks for nothing more.

    And not before: SIGTERM to all processes of a run asks it to save, and that takes batches.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _joined(parts: list[Arrays]) -> Batch:
    faults = [Fault(*f) for part in parts for f in json.loads(part.pop(_FAULTS).tobytes())]
    if len(parts) == 1:
        return Batch(parts[0], tuple(faults))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Batch(arrays, tuple(faults))


def _buckets(source, data: ConfigDict, batch_size: int):
    """([(height, width)], bucket of every sample or None, faults of those in none)."""
    if not data.buckets:
        return [(data.image_size, data.image_size)], None, ()
    shapes = buckets.shapes(data.buckets)
    size_N2 = source.sizes(data.index_dir, data.num_threads)
    # Latents have the shape that they were stored in: none can be given to another bucket.
    stored = getattr(source, "stored", False)
    bucket_N = buckets.assign(size_N2, shapes, 1 if stored else batch_size)
    lost = np.flatnonzero(bucket_N == order.NO_BUCKET).tolist()
    with futures.ThreadPoolExecutor(max(1, data.num_threads)) as pool:
        left_out = [fault for fault in pool.map(functools.partial(_fault, source), lost) if fault]
    return shapes, bucket_N, tuple(left_out)


def _fault(source: sources.Source, i: int) -> Fault | None:
    """Why the size of a sample is not known."""
    try:
        source.size(i)
    except BadSample as error:
        return Fault(-1, -1, source.name(i), str(error.cause), str(error))
    return None


def text_batches(
    source: sources.Source,
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    seed: int,
    steps: int,
) -> Iterator[Arrays]:
    """`steps` batches of shuffled captions, {'ids', 'mask'}, for the language model alone.

    A sample without a caption gives way to the one after it.
    """
    shuffle = order.shuffled(len(source), seed)

    def caption(position: int) -> str:
        for ahead in range(len(source)):
            try:
                return source.caption(shuffle[position + ahead])
            except BadSample:
                continue
        raise ValueError("no sample has a caption")

    for step in range(steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        ids, mask = tokenizer.encode([caption(p) for p in positions], length)
        yield {"ids": ids, "mask": mask}
