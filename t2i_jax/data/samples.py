"""From a place in a batch to what the network trains on: read, judged, resized, captioned.

Every random draw of a sample has a stream of its own, seeded by (seed, kind of draw, position), so
that neither threads nor hosts nor other draws change it. A sample that cannot be used is told, and
another stands in its place: which one is a function of (seed, place), too.
"""

from collections.abc import Iterator, Mapping
import enum
import types
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from t2i_jax.data import images
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.order import Order
from t2i_jax.data.sources import Source
from t2i_jax.errors import UserError

_SHOWN = 10  # of them that the message names
_ATTEMPTS = 100  # samples tried for one place; that all are bad by chance does not happen


class Draw(enum.IntEnum):
    """The kinds of random draws, a word of the seed each (0 is the shuffle's)."""

    ORIGINAL_CAPTION = 1
    CAPTION_DROPOUT = 2
    CROP = 3
    FLIP = 4
    CAPTION = 5


class Fault(NamedTuple):
    """A sample that was to stand at a position, and why it does not."""

    step: int
    position: int
    sample: str
    cause: str
    detail: str


class Row(NamedTuple):
    """One row of a batch: 'image' or 'moments', the caption, and what could not be used for it."""

    arrays: dict[str, np.ndarray]
    caption: str
    faults: tuple[Fault, ...]


class Samples:
    """Rows of the training batches, and of fixed ones. `data` is the config's section."""

    def __init__(self, source: Source, data: ConfigDict, order: Order, batch_size: int, seed: int):
        self._source, self._order = source, order
        self._data = types.SimpleNamespace(**data)  # a ConfigDict is slow to read for every sample
        self._batch_size, self._seed = batch_size, seed

    def index(self, step: int, row: int) -> int:
        """The sample that is meant to stand there."""
        return self._order.index(step, row)

    def read(self, step: int, row: int, shape: tuple[int, int]) -> Row:
        """A row of the global batch at `step`, its image of `shape` (height, width)."""
        position = step * self._batch_size + row

        def candidates() -> Iterator[int]:
            yield self._order.index(step, row)
            for attempt in range(1, _ATTEMPTS):
                yield self._order.replacement(step, row, attempt)

        def use(sample: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
            return self._pixels(sample, position, shape), self._caption(sample, position)

        return self._first_good(candidates(), use, step, position)

    def fixed(self, index: int, shape: tuple[int, int]) -> Row:
        """Sample `index`: nothing dropped or mirrored, cropped centrally; or the next good one."""

        def use(sample: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
            return self._fitted(sample, shape, True, None), self._usable(sample)[0]

        following = ((index + i) % len(self._source) for i in range(_ATTEMPTS))
        return self._first_good(following, use, -1, index)

    def _first_good(self, candidates: Iterator[int], use, step: int, position: int) -> Row:
        faults = []
        for index in candidates:
            try:
                arrays, caption = use(self._source[index])
                return Row(arrays, caption, tuple(faults))
            except BadSample as error:
                name = self._source.name(index)
                faults.append(Fault(step, position, name, str(error.cause), str(error)))
        shown = [f"{fault.sample}: {fault.cause}, {fault.detail}" for fault in faults[:_SHOWN]]
        raise UserError(
            f"{_ATTEMPTS} samples in a row cannot be used. The first:\n  "
            + "\n  ".join(shown)
            + "\nLook at the data: python launch/prepare.py inspect."
        )

    def _rng(self, draw: Draw, position: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, int(draw), position))

    def _happens(self, rate: float, draw: Draw, position: int) -> bool:
        return rate > 0 and self._rng(draw, position).random() < rate

    def _fitted(self, sample, shape, center: bool, rng) -> dict[str, np.ndarray]:
        if "moments" in sample:
            return {"moments": _moments(sample["moments"], shape)}
        least = self._data.min_image_size
        return {"image": images.resize_and_crop(sample["image"], shape, center, rng, least)}

    def _pixels(self, sample, position: int, shape) -> dict[str, np.ndarray]:
        center = self._data.center_crop
        rng = None if center else self._rng(Draw.CROP, position)
        arrays = self._fitted(sample, shape, center, rng)
        if self._data.flip and self._happens(0.5, Draw.FLIP, position):
            return {name: images.mirror(pixels) for name, pixels in arrays.items()}
        return arrays

    def _usable(self, sample) -> list[str]:
        """The captions that are not empty, one at least."""
        found = [caption for caption in sample["captions"] if caption]
        if not found:
            raise BadSample(Cause.EMPTY_CAPTION, "every caption is empty")
        return [self._checked(caption) for caption in found]

    def _checked(self, caption: str) -> str:
        most = self._data.max_caption_chars
        if "\0" in caption:  # where a hole in a file was filled with zeros
            raise BadSample(Cause.BROKEN_CAPTION, "a caption with zero bytes")
        if len(caption) > most:
            length = f"{len(caption)} characters"
            raise BadSample(Cause.LONG_CAPTION, f"a caption of {length}; at most {most} are read")
        return caption

    def _caption(self, sample, position: int) -> str:
        usable = self._usable(sample)
        if self._happens(self._data.caption_dropout, Draw.CAPTION_DROPOUT, position):
            return ""
        if self._happens(self._data.original_caption_rate, Draw.ORIGINAL_CAPTION, position):
            original = sample.get("original_caption")
            if original:
                return self._checked(original)
        if len(usable) == 1:
            return usable[0]
        return usable[int(self._rng(Draw.CAPTION, position).integers(len(usable)))]


def _moments(moments: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Stored latents; ValueError where they were not made for this shape."""
    if not shape[0] % moments.shape[0] == shape[1] % moments.shape[1] == 0 or (
        shape[0] // moments.shape[0] != shape[1] // moments.shape[1]
    ):
        raise ValueError(f"stored latents {moments.shape[:2]} for images of {shape}")
    return moments
