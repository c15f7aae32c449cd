"""From the data section of a config to a source.

A new kind of data is a class with the methods of `Source` and a function in `SOURCES`.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import difflib
import functools
import hashlib
import itertools
import shlex
import types
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict
import numpy as np

from t2i_jax.data import buckets, latents, shard_index
from t2i_jax.data.bad import BadSample
from t2i_jax.data.built_in import BuiltIn
from t2i_jax.data.order import Part, shuffled

SPLITS = ("train", "validation")
MIXED = ("source", "path", "image_field", "caption_field", "original_caption_field")


class Source(Protocol):
    """Random access to captioned images.

    Reading is safe from several threads. What is wrong with one sample raises BadSample. A source
    of files is picklable, for worker processes.
    """

    fingerprint: str  # of what is where, not of contents

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        """{'image': encoded bytes or uint8 (H, W, 3), 'captions': (str, ...)}.

        Where there is one, also 'original_caption'. Instead of the image there may be 'moments',
        uint16 (h, w, 2 C): the bits of bfloat16 means and log-variances of latents.
        """
        ...

    def caption(self, i: int) -> str:
        """The first caption; touches no pixels."""
        ...

    def name(self, i: int) -> str:
        """Where the sample is, for people."""
        ...

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright image; decodes no pixels."""
        ...


class Mixture:
    """Samples of several sources, one after the other, each with its weight.

    With `shuffle_captions` every picture comes with the caption of the sample half the data away:
    the control whose text says nothing.

    Attributes:
      parts: which samples are of which source, and their weights.
      damage: (file, what cannot be told of it), of all sources.
      files: of all sources.
      stored: whether these are latents, which have the shapes that they were stored in.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] = (1.0,),
        shuffle_captions: bool = False,
    ):
        self._sources, self._shuffle_captions = list(sources), shuffle_captions
        self._starts = np.cumsum([0] + [len(source) for source in sources]).tolist()
        spans = itertools.pairwise(self._starts)
        self.parts = [Part(*span, w) for span, w in zip(spans, weights, strict=True)]
        self.damage = [d for source in sources for d in getattr(source, "damage", [])]
        self.files = sum(getattr(source, "files", 0) for source in sources)
        self.stored = any(_is_stored(source) for source in sources)
        prints = [source.fingerprint for source in sources]
        prints += ["shuffled captions"] * shuffle_captions
        self.fingerprint = hashlib.blake2b(" ".join(prints).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which = bisect.bisect_right(self._starts, i) - 1
        return self._sources[which], i - self._starts[which]

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        source, at = self._locate(i)
        if not self._shuffle_captions:
            return source[at]
        own = {key: value for key, value in source[at].items() if key != "original_caption"}
        return own | {"captions": (self.caption(i),)}

    def caption(self, i: int) -> str:
        if self._shuffle_captions:
            i = (i + len(self) // 2) % len(self)
        source, i = self._locate(i)
        return source.caption(i)

    def name(self, i: int) -> str:
        source, i = self._locate(i)
        return source.name(i)

    def size(self, i: int) -> tuple[int, int]:
        source, i = self._locate(i)
        return source.size(i)

    def sizes(self, directory: str = "", threads: int = 16) -> np.ndarray:
        """(N, 2): width and height of every image; (0, 0) for bad samples."""
        directory = directory or str(shard_index.cache_directory())
        return np.concatenate([_sizes(source, directory, threads) for source in self._sources])


class Subset:
    """Samples start to stop of a source, as a source."""

    def __init__(self, source: Source, start: int, stop: int):
        self.source, self.range = source, range(start, stop)
        self.fingerprint = f"{source.fingerprint}[{start}:{stop}]"
        self.damage, self.files = getattr(source, "damage", []), getattr(source, "files", 0)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self.source[self.range[i]]

    def caption(self, i: int) -> str:
        return self.source.caption(self.range[i])

    def name(self, i: int) -> str:
        return self.source.name(self.range[i])

    def size(self, i: int) -> tuple[int, int]:
        return self.source.size(self.range[i])


def _is_stored(source: Source) -> bool:
    whole = source.source if isinstance(source, Subset) else source
    return isinstance(whole, latents.Latents)


def _sizes(source: Source, directory: str, threads: int) -> np.ndarray:
    if isinstance(source, Subset):
        return _sizes(source.source, directory, threads)[source.range.start : source.range.stop]
    if isinstance(source, latents.Latents):
        return source.sizes_N2
    if isinstance(source, BuiltIn):
        return np.full((len(source), 2), source.image_size, np.uint32)
    return buckets.measure(source, directory, threads)


def hold_out(source: Source, size: int, split: str) -> Subset:
    """The last `size` samples ('validation'), or all the others ('train')."""
    cut = len(source) - size
    if size < 0 or cut < 1:
        raise ValueError(
            f"data.validation_size={size} of {len(source)} samples leaves none to train on; "
            "lower it, or add data."
        )
    return Subset(source, *{"train": (0, cut), "validation": (cut, len(source))}[split])


def _webdataset(*args) -> Source:
    from t2i_jax.data import webdataset

    return webdataset.WebDataset(*args)


def _folder(*args) -> Source:
    from t2i_jax.data import folder

    return folder.Folder(*args)


def _arrayrecord(*args) -> Source:
    from t2i_jax.data import records

    return records.ArrayRecords(*args)


def _tfds(*args) -> Source:
    from t2i_jax.data import tfds

    return tfds.Tfds(*args)


def _latents(*args) -> Source:
    return latents.Latents(*args)


@functools.lru_cache(maxsize=16)  # the splits share what can take minutes to open
def _open(kind: Callable[..., Source], *args) -> Source:
    return kind(*args)


def _from_files(kind: Callable[..., Source], *settings: str) -> Callable[[Any, str], Source]:
    """Of a kind whose last samples are held out; `settings` are further keys that it takes."""

    def make(data: Any, split: str) -> Source:
        original = data.original_caption_field if data.original_caption_rate else ""
        fields = (data.path, data.image_field, data.caption_field, original)
        opened = _open(kind, *fields, *(getattr(data, key) for key in settings))
        return hold_out(opened, data.validation_size, split)

    return make


def _from_latents(data: Any, split: str) -> Source:
    return hold_out(_open(_latents, data.path), data.validation_size, split)


def _from_scenes(data: Any, split: str) -> Source:
    from t2i_jax.data import scenes

    length = {"length": data.validation_size} if split == "validation" else {}
    return scenes.Scenes(image_size=data.image_size, split=split, **length)


def _from_digits(data: Any, split: str) -> Source:
    from t2i_jax.data import digits

    return digits.Digits(data.image_size, split, data.validation_size)


FILES = {  # sources that read data.path
    "webdataset": _from_files(_webdataset, "num_threads", "index_dir"),
    "folder": _from_files(_folder),
    "arrayrecord": _from_files(_arrayrecord, "num_threads"),
    "tfds": _from_files(_tfds),
    "latents": _from_latents,
}
SOURCES: dict[str, Callable[[Any, str], Source]] = {
    **FILES,
    "scenes": _from_scenes,
    "digits": _from_digits,
}


class Ingredient(NamedTuple):
    """One source of a mixture: its settings, a data section's, and its weight."""

    data: Any
    weight: float


def ingredients(data: ConfigDict) -> list[Ingredient]:
    """What `data` is mixed of; itself alone, where data.mixture is empty. Raises ValueError.

    An entry is 'weight=0.3 source=folder path=DIR ...'; what it does not say is as in `data`.
    """
    if not data.mixture:
        return [Ingredient(types.SimpleNamespace(**data), 1.0)]
    found = []
    for entry in data.mixture:
        try:
            pairs = dict(word.split("=", 1) for word in shlex.split(entry))
            weight = float(pairs.pop("weight"))
        except (ValueError, KeyError) as error:
            raise ValueError(f"data.mixture: {entry!r} must be like 'weight=0.3 path=X'") from error
        unknown = sorted(pairs.keys() - set(MIXED))
        if unknown or not 0 < weight < float("inf"):
            what = f"the weight {weight:g}" if not unknown else f"{unknown[0]!r}"
            raise ValueError(
                f"data.mixture: {what} in {entry!r}; a positive weight and any of "
                f"{', '.join(MIXED)} are expected"
            )
        found.append(Ingredient(types.SimpleNamespace(**{**data, **pairs}), weight))
    total = sum(weight for _, weight in found)
    held_out = [round(data.validation_size * weight / total) for _, weight in found]
    for (section, _), size in zip(found, held_out, strict=True):
        section.validation_size = max(size, 1) if data.validation_size else 0
    return found


def make_source(config: ConfigDict, split: str) -> Mixture:
    """The source that `config.data` describes; `split` is 'train' or 'validation'."""
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'validation', got {split!r}")
    mixed = ingredients(config.data)
    for section, _ in mixed:
        if section.source not in SOURCES:
            near = difflib.get_close_matches(str(section.source), SOURCES, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Unknown data.source {section.source!r}; known are {', '.join(SOURCES)}.{hint}"
            )
        if section.source == "latents":
            latents.check(latents.read_card(section.path), config)
    made = [SOURCES[section.source](section, split) for section, _ in mixed]
    weights = [weight for _, weight in mixed]
    return Mixture(made, weights, config.data.shuffle_captions)


def captions(source: Source, n: int, seed: int) -> Iterator[str]:
    """The captions of `n` different samples drawn at random (all of them if there are fewer).

    Samples without one are passed over.
    """
    order = shuffled(len(source), seed)
    for position in range(min(n, len(source))):
        try:
            yield source.caption(order[position])
        except BadSample:
            continue
