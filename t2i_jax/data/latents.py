"""Latents that `launch/prepare.py latents` has stored: posteriors of images, with their captions.

    DIR/latents.json              of what, by which autoencoder, how many shards: checked at open
    DIR/00000.array_record        tf.train.Examples, in the order of the data that was encoded
    DIR/00000.json                written last: how many samples, of which sizes, which were bad

A posterior is (h, w, 2 C) bfloat16, means then log-variances, so that training still samples.
"""

from collections import Counter
import json
from typing import Any

from etils import epath
import numpy as np

from t2i_jax.data import example, records
from t2i_jax.data.bad import BadSample, Cause

CARD = "latents.json"
VERSION = 1
AUTOENCODER = ("kind", "channels", "downsample", "scale", "shift")  # keys that training must share
_SHARED = ("image_size", "buckets")  # of the data section, likewise


def shard(directory: epath.PathLike, number: int, suffix: str) -> epath.Path:
    return epath.Path(directory) / f"{number:05d}.{suffix}"


def read_card(directory: epath.PathLike) -> dict[str, Any]:
    """What DIR/latents.json says. Raises FileNotFoundError, ValueError."""
    path = epath.Path(directory) / CARD
    if not path.exists():
        raise FileNotFoundError(
            f"data.path = {str(directory)!r} holds no {CARD}: it is no directory of latents. Make "
            "one: python launch/prepare.py latents --config=... --out=DIR"
        )
    try:
        card = json.loads(path.read_text())
        if card["version"] != VERSION:
            raise ValueError(f"version {card['version']}, {VERSION} is read")
        return card
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def check(card: dict[str, Any], config: Any) -> None:
    """Raises ValueError where latents are not those that `config` would make of the images."""
    for section, keys in (("data", _SHARED), ("autoencoder", AUTOENCODER)):
        for key in keys:
            was, now = card[section][key], config[section][key]
            if was != (list(now) if isinstance(now, tuple) else now):
                raise ValueError(
                    f"{section}.{key} = {now!r}, but the latents in data.path were made with "
                    f"{was!r}"
                )

    if config["data"]["original_caption_rate"] > 0 and not card["originals"]:
        raise ValueError(
            "data.original_caption_rate > 0, but the latents in data.path were made with "
            "data.original_caption_field = ''"
        )


def encode(moments: np.ndarray, sample: dict[str, Any], name: str) -> bytes:
    """A record: uint16 (h, w, 2 C), the captions of a sample, and where it was."""
    original = sample.get("original_caption")
    return example.encode(
        {
            "moments": moments.astype("<u2").tobytes(),
            "shape": list(moments.shape),
            "captions": [caption.encode() for caption in sample["captions"]],
            "original_caption": [original.encode()] if original else [],
            "name": name.encode(),
        }
    )


class Latents:
    """A directory of stored latents as a source. Raises ValueError where it is not complete."""

    def __init__(self, directory: epath.PathLike):
        self.card = read_card(directory)
        number = self.card["shards"]
        summaries = [shard(directory, i, "json") for i in range(number)]
        absent = [path.name for path in summaries if not path.exists()]
        if absent:
            raise ValueError(
                f"{directory}: {len(absent)} of {number} shards are not encoded yet ({absent[0]}, "
                "...). Run the same `launch/prepare.py latents` again: it goes on."
            )
        found = [json.loads(path.read_text()) for path in summaries]
        counts = [sum(count for _, count in entry["runs"]) for entry in found]
        paths = [str(shard(directory, i, "array_record")) for i in range(number)]
        spans = [records.Span(path, 0, n) for path, n in zip(paths, counts, strict=True)]
        for span in spans:
            if span.count and records.whole(span.path).count != span.count:
                raise ValueError(f"{span.path} has not its {span.count} records; encode it again.")
        self._records = records.Examples(spans, "moments", "captions", "original_caption")
        self.files = number
        self.bad = sum((Counter(entry["bad"]) for entry in found), Counter())
        runs = [run for entry in found for run in entry["runs"]]  # ((width, height), how many)
        sizes = np.array([size for size, _ in runs], np.uint32).reshape(-1, 2)
        self.sizes_N2 = np.repeat(sizes, [count for _, count in runs], axis=0)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        return self._records.fingerprint

    def name(self, i: int) -> str:
        return self._records.name(i)

    def caption(self, i: int) -> str:
        return self._records.caption(i)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the image that was encoded, after resizing and cropping."""
        width, height = self.sizes_N2[i].tolist()
        return width, height

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{'moments': uint16 (h, w, 2 C), 'captions', 'original_caption'}."""
        features = self._records.features(i)
        captions, original = self._records.texts(features)
        try:
            shape = [int(n) for n in features["shape"]]
            (data,) = features["moments"]
            moments = np.frombuffer(data, "<u2").reshape(shape).astype(np.uint16)
        except (KeyError, ValueError, TypeError) as error:
            raise BadSample(Cause.UNREADABLE, f"its latents: {error}") from error
        return {"moments": moments, "captions": captions, "original_caption": original}
