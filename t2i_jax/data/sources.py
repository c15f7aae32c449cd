"""From the data section of a config to a source, and orders over it.

A source has `len(source)`, `source[i]` -> {'image': encoded bytes or uint8 pixels, 'caption': str,
...} and `source.caption(i)`, which touches no pixels. A new one is a function in `SOURCES`.
"""

from collections.abc import Callable, Iterator, Mapping
import difflib
import functools
from typing import Any, Protocol

import grain
from ml_collections import ConfigDict
import numpy as np

SPLITS = ("train", "validation")
_ORDER = 0  # this module's word in seed sequences; the loader's draws have other ones


class Source(Protocol):
    """Random access to captioned images."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]: ...

    def caption(self, i: int) -> str: ...


class Subset:
    """Samples start to stop of a source, as a source."""

    def __init__(self, source: Source, start: int, stop: int):
        self._source, self._range = source, range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._source[self._range[i]]

    def caption(self, i: int) -> str:
        return self._source.caption(self._range[i])


def hold_out(source: Source, size: int, split: str) -> Subset:
    """The last `size` samples ('validation'), or all the others ('train')."""
    cut = len(source) - size
    if size < 0 or cut < 1:
        raise ValueError(
            f"data.validation_size={size} of {len(source)} samples leaves none to train on; "
            "lower it, or add data."
        )
    return Subset(source, *{"train": (0, cut), "validation": (cut, len(source))}[split])


@functools.lru_cache(maxsize=2)  # the splits share one index, which can take minutes to read
def _webdataset(*args):
    from t2i_jax.data import webdataset

    return webdataset.WebDataset(*args)


def _from_webdataset(data: ConfigDict, split: str) -> Source:
    original = data.original_caption_field if data.original_caption_rate else ""
    fields = (data.image_field, data.caption_field, original)
    return hold_out(_webdataset(data.path, *fields, data.num_threads), data.validation_size, split)


def _from_scenes(data: ConfigDict, split: str) -> Source:
    from t2i_jax.data import scenes

    length = {"length": data.validation_size} if split == "validation" else {}
    return scenes.Scenes(image_size=data.image_size, split=split, **length)


def _from_digits(data: ConfigDict, split: str) -> Source:
    from t2i_jax.data import digits

    return digits.Digits(data.image_size, split, data.validation_size)


SOURCES: dict[str, Callable[[ConfigDict, str], Source]] = {
    "webdataset": _from_webdataset,
    "scenes": _from_scenes,
    "digits": _from_digits,
}


def make_source(config: ConfigDict, split: str) -> Source:
    """The source that `config.data` describes; `split` is 'train' or 'validation'."""
    name = config.data.source
    if name not in SOURCES:
        near = difflib.get_close_matches(str(name), SOURCES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown data.source {name!r}; known are {', '.join(SOURCES)}.{hint}")
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'validation', got {split!r}")
    return SOURCES[name](config.data, split)


def shuffled(length: int, seed: int) -> grain.MapDataset:
    """Position -> index, without end: every epoch of `length` positions is a new permutation.

    Random access costs the same at every position. `seed` is hashed first, because grain's seed of
    epoch e is seed + e: neighbouring seeds would meet the same epochs.
    """
    if not 0 < length < 2**32:
        raise ValueError(f"a source of {length} samples; 1 to {2**32 - 1} can be shuffled")
    word = int(np.random.SeedSequence((seed, _ORDER)).generate_state(1)[0])
    return grain.MapDataset.range(length).shuffle(seed=word).repeat(reseed_each_epoch=True)


def captions(source: Source, n: int, seed: int) -> Iterator[str]:
    """The captions of `n` different samples drawn at random (all of them if there are fewer)."""
    order = shuffled(len(source), seed)
    for position in range(min(n, len(source))):
        yield source.caption(order[position])
