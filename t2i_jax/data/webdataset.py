"""WebDataset shards (tar files) as a random-access source, read where they lie.

Opening takes the index of every shard (shard_index.py) and keeps, of the configured fields, eight
bytes a member; after that only these members are ever read.
"""

import bisect
from collections.abc import Mapping
import hashlib
import json
import os
from typing import Any, NamedTuple

import numpy as np

from t2i_jax.data import images, patterns, shard_index, shared, tar
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.shard_index import ABSENT, BLOCK, KINDS, ShardIndex

_MAX_TEXT, _MAX_IMAGE = 1 << 20, 1 << 28  # bytes of a member; larger ones are not read
_HEAD = 4096  # bytes of an image that mostly have its size
_ARRAYS = ("_blocks", "_sizes", "_names", "_ends")


class Field(NamedTuple):
    """A member of a sample, and with 'json:text.en' the place of a value in it."""

    member: str
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Field":
        """Raises ValueError where it is of a kind that is not read."""
        member, _, path = text.strip().partition(":")
        kind = member.rpartition(".")[2].lower()
        if kind not in KINDS or (path and kind != "json"):
            raise ValueError(
                f"field {text!r}: members that end in {', '.join(KINDS)} are read, and of JSON "
                "one value, as 'json:caption'."
            )
        return cls(member.lower(), tuple(path.split(".")) if path else ())


class WebDataset:
    """Captioned images in WebDataset shards, in the order of the shards.

    `caption_field` may name several, with commas: a sample has those captions that are there. What
    has an image or a caption is a sample; one that lacks either is a BadSample when it is read.
    Raises FileNotFoundError for a pattern without files, ValueError where no sample has the fields.

    Attributes:
      damage: (shard, Damage) of what cannot be told of the shards.
      files: how many shards there are.
    """

    def __init__(
        self,
        pattern: str,
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
        num_threads: int = 16,
        index_dir: str = "",
    ):
        self._shards = patterns.expand(pattern)
        self._image = Field.parse(image_field)
        self._captions = [Field.parse(text) for text in caption_field.split(",")]
        self._original = Field.parse(original_caption_field) if original_caption_field else None
        wanted = [self._image, *self._captions, *([self._original] if self._original else [])]
        self._columns = {member: i for i, member in enumerate(dict.fromkeys(f[0] for f in wanted))}
        indexes = shard_index.open_all(self._shards, index_dir, num_threads)
        self._check(pattern, indexes)
        self._take(indexes)
        self._pool = tar.FilePool()
        self.files = len(self._shards)
        self.damage = [
            (shard, damage)
            for shard, index in zip(self._shards, indexes, strict=True)
            for damage in index.damage
        ]

    def _check(self, pattern: str, indexes: list[ShardIndex]) -> None:
        seen = sorted(set().union(*(index.fields for index in indexes)))
        absent = [member for member in self._columns if member not in seen]
        if absent or not any(len(index.keys) for index in indexes):
            opened = zip(self._shards, indexes, strict=True)
            damaged = [(shard, index.damage[0].reason) for shard, index in opened if index.damage]
            raise ValueError(
                f"No sample of {pattern!r} has {' and '.join(map(repr, absent or self._columns))}; "
                f"the shards hold the fields {seen[:20]}"
                + (
                    f"; {len(damaged)} of {len(indexes)} are damaged, the first: "
                    if damaged
                    else ""
                )
                + (": ".join(damaged[0]) if damaged else "")
                + ". Set data.image_field, data.caption_field and data.original_caption_field to "
                "what is there."
            )

    def _take(self, indexes: list[ShardIndex]) -> None:
        """Keeps the configured columns of the rows that have an image or a caption."""
        needed = [self._columns[f.member] for f in (self._image, *self._captions)]
        blocks, sizes, names, lengths = [], [], [], []
        for index in indexes:
            columns = [
                index.fields.index(member) if member in index.fields else -1
                for member in self._columns
            ]
            absent = np.full((len(index.keys), 1), ABSENT, np.uint32)
            table = np.concatenate([index.blocks, absent], 1)[:, columns]
            rows = (table[:, needed] != ABSENT).any(1)
            blocks.append(table[rows])
            sizes.append(np.concatenate([index.sizes, absent], 1)[:, columns][rows])
            keys = index.keys[rows]
            lengths.append(np.char.str_len(keys))
            bytes_NK = keys.view(np.uint8).reshape(len(keys), keys.itemsize)
            names.append(bytes_NK[np.arange(keys.itemsize) < lengths[-1][:, None]])
        self._starts = np.cumsum([0] + [len(part) for part in lengths]).tolist()
        self._blocks, self._sizes = np.concatenate(blocks), np.concatenate(sizes)
        # End to end: in a table as wide as the longest of them, millions would fill the memory.
        self._names = np.concatenate(names)
        self._ends = np.concatenate([[0], *lengths]).cumsum()

    def __getstate__(self) -> dict[str, Any]:
        packed = {name: shared.pack(getattr(self, name)) for name in _ARRAYS}
        return {**self.__dict__, **packed, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: shared.unpack(state[name]) for name in _ARRAYS}
        self.__dict__.update(state, **arrays, _pool=tar.FilePool())

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """Changes with the shards' names and the places of their members."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self._shards:
            digest.update(os.fsencode(os.path.basename(shard)) + b"\0")
        digest.update(self._blocks)
        digest.update(self._sizes)
        return digest.hexdigest()

    def _shard(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._shards[bisect.bisect_right(self._starts, i) - 1]

    def name(self, i: int) -> str:
        """'shard/key', where what is not UTF-8 stands as '\\udcff'."""
        shard = self._shard(i)
        key = os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]].tobytes())
        name = f"{os.path.basename(shard)}/{key}"
        return name.encode("utf-8", "backslashreplace").decode()

    def _has(self, i: int, field: Field) -> bool:
        return self._blocks[i, self._columns[field.member]] != ABSENT

    def _read(self, i: int, field: Field, most: int | None = None) -> bytes:
        column = self._columns[field.member]
        size = int(self._sizes[i, column])
        offset = int(self._blocks[i, column]) * BLOCK
        size = size if most is None else min(size, most)
        return self._pool.read(self._shard(i), offset, size)

    def _text(self, i: int, field: Field) -> str | tuple[str, ...]:
        """The text of a member, or what a JSON has at the field's path: a text or several."""
        size = int(self._sizes[i, self._columns[field.member]])
        if size > _MAX_TEXT:
            raise BadSample(Cause.LONG_CAPTION, f"{field.member} has {size} bytes")
        try:
            text = self._read(i, field).decode("utf-8-sig")
            if not field.path:
                return text.strip()
            value = _value(json.loads(text), field.path)
            "".join(value).encode()  # what JSON escapes may be half a character
            return value
        except BadSample:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            where = ":".join([field.member, ".".join(field.path)]).rstrip(":")
            raise BadSample(Cause.BROKEN_CAPTION, f"{where}: {error!r}") from error

    def captions(self, i: int) -> tuple[str, ...]:
        """Those that are there, one at least."""
        self._shard(i)
        found = [self._text(i, field) for field in self._captions if self._has(i, field)]
        if not found:
            names = ", ".join(field.member for field in self._captions)
            raise BadSample(Cause.MISSING_CAPTION, f"has no {names}")
        return tuple(t for text in found for t in (text if isinstance(text, tuple) else (text,)))

    def caption(self, i: int) -> str:
        return self.captions(i)[0]

    def _image_bytes(self, i: int, most: int | None = None) -> bytes:
        if not self._has(i, self._image):
            raise BadSample(Cause.MISSING_IMAGE, f"has no {self._image.member}")
        size = int(self._sizes[i, self._columns[self._image.member]])
        if size > _MAX_IMAGE:
            raise BadSample(Cause.TOO_LARGE_IMAGE, f"{self._image.member} has {size} bytes")
        return self._read(i, self._image, most)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright image, from its header."""
        self._shard(i)
        try:
            return images.upright_size(self._image_bytes(i, _HEAD))
        except BadSample:
            return images.upright_size(self._image_bytes(i))

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        """The encoded image and its captions; what is wrong with it raises BadSample."""
        captions = self.captions(i)
        original = None
        if self._original and self._has(i, self._original):
            original = self._text(i, self._original)
            original = original[0] if isinstance(original, tuple) else original
        return {
            "image": self._image_bytes(i),
            "captions": captions,
            "original_caption": original,
        }


def _value(tree: Any, path: tuple[str, ...]) -> str | tuple[str, ...]:
    """The text, or the texts, at `path` of a JSON. Raises KeyError, TypeError."""
    for name in path:
        tree = tree[name]
    if isinstance(tree, str):
        return tree.strip()
    if isinstance(tree, list) and tree and all(isinstance(text, str) for text in tree):
        return tuple(text.strip() for text in tree)
    raise TypeError(f"a text, or a list of them, is expected, got {type(tree).__name__}")
