"""The input side: images a second of a core, beside what bare decoding and resizing could do.

What is compared runs in turns in one process, so that other load on the machine meets all of it.
"""

from collections.abc import Callable
import importlib.util
import io
import os
from pathlib import Path
import tarfile
import tempfile
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import simplejpeg

from t2i_jax import config as configs
from t2i_jax.data import images, sources
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.speed import timing

SIZES = ((512, 512), (768, 512), (1024, 768))  # width, height of the pictures
TARGET = 512
_QUALITY = 90
_WORDS = ("a", "red", "large", "photo", "of", "dog", "table", "two", "window", "old", "street")


def measure(rounds: int = 5, count: int = 24, decoders: bool = False) -> dict[str, Any]:
    """Medians over `rounds` of `count` JPEGs of each size, on one core, as a tree for JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # tokenizers take all they get
    rng = np.random.default_rng(0)
    found = {}
    for width, height in SIZES:
        pictures = [jpeg(rng, width, height) for _ in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            loader = _loader(Path(folder), pictures)
            ways = {
                "decode": lambda pictures=pictures: list(map(_decode, pictures)),
                "decode, resize": lambda pictures=pictures: list(map(_bare, pictures)),
                "Pillow": lambda pictures=pictures: list(map(_pillow, pictures)),
                "loader": lambda loader=loader: loader.batch(0),
            }
            ways |= _decoders(pictures) if decoders else {}
            times = timing.in_turns(ways, rounds)
        seconds = {way: took.median for way, took in times.items()}
        rates = {way: count / took for way, took in seconds.items()}
        found[f"{width} x {height}"] = {
            "images_per_second_per_core": {way: round(rate, 1) for way, rate in rates.items()},
            "loader_of_bare": round(rates["loader"] / rates["decode, resize"], 3),
            "loader_of_pillow": round(rates["loader"] / rates["Pillow"], 3),
            "decode_share": round(seconds["decode"] / seconds["loader"], 3),
            "bytes_of_an_image": int(np.mean([len(data) for data in pictures])),
        }
    return found


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` as a table."""
    lines = ["images a second on one core:"]
    for size, entry in found.items():
        rates = entry["images_per_second_per_core"]
        listed = ", ".join(f"{way} {rate:g}" for way, rate in rates.items())
        lines.append(
            f"  {size:>11} JPEG, {entry['bytes_of_an_image'] / 1000:.0f} kB: {listed}; the loader "
            f"does {entry['loader_of_bare']:.0%} of bare decode and resize, "
            f"{entry['loader_of_pillow']:.0%} of Pillow's; "
            f"{entry['decode_share']:.0%} of its time is decoding"
        )
    return "\n".join(lines)


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A picture with the spectrum of photographs (amplitude 1 / frequency), as JPEG."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    shape = (3, height, width)
    noise = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    waves = np.fft.ifft2(noise / frequency**1.1).real
    waves = waves / waves.std(axis=(1, 2), keepdims=True)
    waves = 0.6 * waves.mean(axis=0) + 0.4 * waves  # channels are alike in photographs
    pixels = np.clip(120 + 45 * waves, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data)


def _bare(data: bytes) -> np.ndarray:
    """The recipe's pixels with nothing around: decode, resize where that is needed, crop."""
    return images.resize_and_crop(_decode(data), TARGET)


class _Repeated:
    """A source many times over: the shuffle of a handful of samples is slow, of thousands fast."""

    def __init__(self, source: sources.Source, length: int):
        self._source, self._length, self.fingerprint = source, length, source.fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Any:
        return self._source[i % len(self._source)]


def _pillow(data: bytes, draft: bool = False) -> np.ndarray:
    """The same pixels by Pillow alone, all the way an image of its own."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (TARGET, TARGET))
    shorter = min(image.size)
    if shorter != TARGET:
        size = tuple(side * TARGET // shorter for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = ((side - TARGET) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + TARGET, top + TARGET)))


def _loader(folder: Path, pictures: list[bytes]) -> Loader:
    """All pictures in one batch, from a shard, with captions of 80 words."""
    rng = np.random.default_rng(1)
    captions = [" ".join(rng.choice(_WORDS, 80)) for _ in pictures]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i, (data, text) in enumerate(zip(pictures, captions, strict=True)):
            for field, body in (("image.jpg", data), ("synthetic_caption.txt", text.encode())):
                info = tarfile.TarInfo(f"{i:06}.{field}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    config: ConfigDict = configs.base().unlock()
    config.data.update(path=str(folder / "a.tar"), image_size=TARGET, validation_size=0)
    source = _Repeated(sources.make_source(config, "train"), 1_000_000)
    prompts = Prompts(Tokenizer.train(captions, 400), config.data)
    return Loader(source, prompts, config.data, len(pictures), config.seed)


def _decoders(pictures: list[bytes]) -> dict[str, Callable[[], Any]]:
    """Other libraries at the same work, those that are installed."""
    ways: dict[str, Callable[[bytes], Any]] = {
        "Pillow, draft": lambda data: _pillow(data, draft=True),
        "simplejpeg, reduced": lambda data: images.resize_and_crop(
            simplejpeg.decode_jpeg(data, min_width=TARGET, min_height=TARGET), TARGET
        ),
    }
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        ways["OpenCV"] = lambda data: images.resize_and_crop(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), TARGET
        )
    return {name: lambda way=way: [way(data) for data in pictures] for name, way in ways.items()}
