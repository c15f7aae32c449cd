"""Aspect-ratio buckets: a fixed set of shapes, so that pictures are cropped little.

A sample belongs to the shape whose aspect ratio is nearest to its own, by the ratio of the two
(NovelAI's scheme, as SDXL describes it: arXiv 2307.01952, section 2.3).
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import re
import uuid

from etils import epath
import numpy as np

from t2i_jax.data.bad import BadSample
from t2i_jax.data.order import NO_BUCKET
from t2i_jax.progress import Progress

_SHAPE = re.compile(r"(\d+)x(\d+)")
_CHUNK = 4096  # samples measured between two updates of the progress


def parse(text: str) -> tuple[int, int]:
    """'640x384', width x height -> (height, width). Raises ValueError."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no shape as '640x384', width x height")
    return int(match[2]), int(match[1])


def shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """[(height, width)] of `data.buckets`."""
    return [parse(text) for text in texts]


def assign(size_N2: np.ndarray, shapes: Sequence[tuple[int, int]], least: int) -> np.ndarray:
    """The bucket of every sample, (N,) int16, by its (width, height); (0, 0) is NO_BUCKET.

    A bucket with fewer than `least` samples (a batch) gives them to the nearest that has enough, or
    if none has, all go to the fullest.
    """
    known_N = (size_N2 > 0).all(1)
    width_N, height_N = np.maximum(size_N2, 1).T.astype(float)
    ratio_N = np.log(width_N / height_N)
    target_S = np.array([np.log(width / height) for height, width in shapes])
    bucket_N = np.full(len(size_N2), NO_BUCKET, np.int16)
    allowed = list(range(len(shapes)))
    while True:
        order = np.argsort(target_S[allowed], kind="stable")
        targets = target_S[allowed][order]
        nearest_N = order[np.searchsorted((targets[1:] + targets[:-1]) / 2, ratio_N)]
        bucket_N[known_N] = np.array(allowed)[nearest_N[known_N]]
        counts = np.bincount(bucket_N[known_N], minlength=len(shapes))[allowed]
        if counts.min() >= least or len(allowed) == 1:
            return bucket_N
        if (counts[counts > 0] >= least).all():
            return bucket_N  # those that are left are empty
        allowed.remove(allowed[int(np.argmin(np.where(counts > 0, counts, counts.max() + 1)))])


def measure(source, directory: str = "", threads: int = 16) -> np.ndarray:
    """(N, 2) uint32: width and height of every image, from the headers; (0, 0) for bad samples.

    Kept in `directory` under the source's fingerprint, where one is given.
    """
    place = epath.Path(directory) / f"{source.fingerprint}.sizes.npy" if directory else None
    if place is not None and (kept := _read(place, len(source))) is not None:
        return kept
    size_N2 = np.zeros((len(source), 2), np.uint32)

    def one(i: int) -> None:
        with contextlib.suppress(BadSample):  # listed by whoever needs the sizes
            size_N2[i] = source.size(i)

    show = len(source) > 10 * _CHUNK
    bar = Progress(len(source), name="measuring images", unit="images") if show else None
    with futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(source), _CHUNK):
            list(pool.map(one, range(start, min(start + _CHUNK, len(source)))))
            if bar is not None:
                bar.update(min(start + _CHUNK, len(source)))
    if bar is not None:
        bar.close()
    if place is not None:
        _write(place, size_N2)
    return size_N2


def _read(place: epath.Path, length: int) -> np.ndarray | None:
    try:
        with place.open("rb") as file:
            size_N2 = np.load(file, allow_pickle=False)
        return size_N2 if size_N2.shape == (length, 2) else None
    except Exception:  # whatever is raised at no file, or a damaged one: measured anew
        return None


def _write(place: epath.Path, array: np.ndarray) -> None:
    with contextlib.suppress(OSError):  # measured again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.parent / f".{place.name}.{uuid.uuid4().hex}"
        with new.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        new.replace(place)
