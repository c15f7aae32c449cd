"""Batches whose content depends on (seed, step) alone.

The global sample stream is numbered by *position*: step s of a batch size B holds the positions
s B to (s + 1) B, of which host h of H takes its H-th part. Position -> sample is a shuffle that is
computed, not stored, and every random draw of a sample has its own stream, seeded by (seed, kind
of draw, position). So the step is the whole state of the input pipeline: any batch is reached
directly, and neither the number of hosts nor that of threads changes a pixel.
"""

from collections.abc import Iterator, Sequence
import contextlib
import enum
import sys
import types
from typing import Any

import grain
from ml_collections import ConfigDict
import numpy as np

from t2i_jax.data import images, sources
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Draw(enum.IntEnum):
    """The kinds of random draws, a word of the seed each (0 is the shuffle's)."""

    ORIGINAL_CAPTION = 1
    CAPTION_DROPOUT = 2
    CROP = 3
    FLIP = 4


class Loader:
    """Shuffled training batches of one host, endlessly, from any step.

    A batch is {'image': uint8 (b, H, W, 3), 'ids': int32 (b, T), 'mask': bool (b, T), ...}, where
    b = batch_size / process_count and all but the image is what `prompts` makes of the captions.
    `data` is the config's data section.
    """

    def __init__(
        self,
        source: sources.Source,
        prompts: Prompts,
        data: ConfigDict,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"train.batch_size={batch_size} does not divide over {process_count} hosts; "
                "make it a multiple."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"host {process_index} of {process_count}")
        self._source, self._prompts = source, prompts
        self._data = types.SimpleNamespace(**data)  # a ConfigDict is slow to read for every sample
        self._batch_size, self._seed = batch_size, seed
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        self._order = sources.shuffled(len(source), seed)
        self._iterators: set[Any] = set()

    def batch(self, step: int) -> Batch:
        """The batch of this host at `step`, made on the spot."""
        return self._part(step, 0, self._rows)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, made ahead by threads. Close it, or the loader."""
        threads, ahead = self._data.num_threads, self._data.prefetch
        # Parts of batches, as many as keep all threads busy with no more than `ahead` batches.
        parts = min(self._rows, max(1, -(-threads // max(1, ahead))))

        def part(number: int) -> Batch:
            step, k = divmod(number, parts)
            return self._part(step, k * self._rows // parts, (k + 1) * self._rows // parts)

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead * parts)
        dataset = grain.MapDataset.range(start_step * parts, sys.maxsize).map(part)
        iterator = iter(dataset.to_iter_dataset(options))
        self._iterators.add(iterator)
        try:
            while True:
                pieces = [next(iterator) for _ in range(parts)]
                yield pieces[0] if parts == 1 else _concatenate(pieces)
        finally:
            self._iterators.discard(iterator)
            iterator.close()

    def fixed_batch(self, indices: Sequence[int]) -> Batch:
        """The samples `indices` of the source: nothing dropped or mirrored, cropped centrally."""
        size = self._data.image_size
        pixels, captions = self._empty(len(indices)), []
        for row, index in enumerate(indices):
            sample = self._source[index]
            with _naming(sample, index):
                pixels[row] = images.resize_and_crop(sample["image"], size)
            captions.append(sample["caption"])
        return {"image": pixels, **self._prompts.encode(captions)}

    def close(self) -> None:
        """Stops the threads of all iterators."""
        while self._iterators:
            self._iterators.pop().close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _part(self, step: int, first: int, last: int) -> Batch:
        """Rows `first` to `last` of this host's batch at `step`."""
        start = step * self._batch_size + self._first_row
        pixels, captions = self._empty(last - first), []
        for row, position in enumerate(range(start + first, start + last)):
            index = self._order[position]
            sample = self._source[index]
            with _naming(sample, index):
                pixels[row] = self._image(sample, position)
            captions.append(self._caption(sample, position))
        return {"image": pixels, **self._prompts.encode(captions)}

    def _empty(self, count: int) -> np.ndarray:
        return np.empty((count, self._data.image_size, self._data.image_size, 3), np.uint8)

    def _rng(self, draw: Draw, position: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, int(draw), position))

    def _happens(self, rate: float, draw: Draw, position: int) -> bool:
        return rate > 0 and self._rng(draw, position).random() < rate

    def _image(self, sample, position: int) -> np.ndarray:
        center = self._data.center_crop
        rng = None if center else self._rng(Draw.CROP, position)
        image = images.resize_and_crop(sample["image"], self._data.image_size, center, rng)
        flip = self._data.flip and self._happens(0.5, Draw.FLIP, position)
        return images.mirror(image) if flip else image

    def _caption(self, sample, position: int) -> str:
        if self._happens(self._data.caption_dropout, Draw.CAPTION_DROPOUT, position):
            return ""
        caption = sample["caption"]
        if self._happens(self._data.original_caption_rate, Draw.ORIGINAL_CAPTION, position):
            caption = sample.get("original_caption") or caption
        return caption


@contextlib.contextmanager
def _naming(sample, index: int):
    """Says which sample it was where one cannot be used."""
    try:
        yield
    except images.BadImage as error:
        raise images.BadImage(f"sample {sample.get('key', index)}: {error}") from error


def _concatenate(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def text_batches(
    source: sources.Source,
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    seed: int,
    steps: int,
) -> Iterator[Batch]:
    """`steps` batches of shuffled captions, {'ids', 'mask'}, for the language model alone."""
    order = sources.shuffled(len(source), seed)
    for step in range(steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        ids, mask = tokenizer.encode([source.caption(order[p]) for p in positions], length)
        yield {"ids": ids, "mask": mask}
