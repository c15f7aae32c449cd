"""Images of a benchmark in files: what a killed run has drawn is not drawn again.

A folder holds the images of one checkpoint, drawn one way, as `drawn.json` in it says: it is
refused for any other. `items.json` has a checksum of the prompt and the numbers of every file, so
that a file is never taken for the picture of something else; files may be added. A file gets its
name when it is complete. As image i of a seed is the same picture in any batch, a folder that was
filled in several goes is the one that was filled in one.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import functools
import json
from typing import Any, NamedTuple
import zlib

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from PIL import Image

from t2i_jax import digest, distributed, options
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation import gallery
from t2i_jax.pipeline import Pipeline
from t2i_jax.progress import Progress

ABOUT, ITEMS = "drawn.json", "items.json"
_WRITERS = 8  # threads that compress PNGs beside the drawing
_MOVES = ("checkpoint",)  # a directory may be moved
_CHUNK = 64  # images between looks at the files, at least


class Item(NamedTuple):
    """A file, and the images of one prompt in it: one, or four in two rows."""

    file: str  # in the folder; ends in .png
    prompt: str
    numbers: tuple[int, ...]  # of its images


@dataclasses.dataclass(frozen=True)
class Way:
    """How all images of a folder are drawn."""

    pipeline: Pipeline
    seed: int
    choices: Mapping[str, Any]  # arguments of `options.resolve`
    told: Mapping[str, Any]  # of the checkpoint, for whom it may concern

    @functools.cached_property
    def options(self) -> options.Options:
        """The choices, resolved."""
        return options.resolve(self.pipeline.config, **self.choices)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What is written of it, for JSON; of the weights a checksum of their digests."""
        pipeline = self.pipeline
        weights = digest.digests({"params": pipeline.params, "frozen": pipeline.frozen})
        how = gallery.how_drawn(pipeline, self.options)
        return {"seed": self.seed, **how, "weights_checksum": _checksum(weights), **self.told}

    def checksum(self, *more: str) -> str:
        """Of all of it and of `more`, but for where the checkpoint lies."""
        about = {key: x for key, x in self.about.items() if key not in _MOVES}
        return _checksum([about, *more])


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def draw(
    way: Way, items: Sequence[Item], folder: epath.Path, name: str, *, alone: bool = False
) -> None:
    """Draws what is missing of `items`, with a progress bar called `name`.

    Raises ConfigError where the folder has images that were drawn otherwise or are of something
    else, with `alone` also where it has more than these, or where it cannot be written.
    """
    about = way.about
    _claim(folder, about, items, alone=alone)
    way.pipeline.tell_cut([item.prompt for item in items])
    missing = [item for item, gone in zip(items, _missing(folder, items), strict=True) if gone]
    total = sum(len(item.numbers) for item in items)
    there = total - sum(len(item.numbers) for item in missing)
    main = jax.process_index() == 0
    with Progress(total, there, name=name, shown=main) as bar, _Writer(folder) as writer:
        for part in _chunks(missing, max(_CHUNK, way.pipeline.config.sampling.batch_size)):
            pairs = [(item.prompt, number) for item in part for number in item.numbers]
            prompts, numbers = zip(*pairs, strict=True)
            images = iter(way.pipeline.draw(prompts, numbers=numbers, seed=way.seed, **way.choices))
            for item in part:
                own = [next(images) for _ in item.numbers]
                if main:
                    line = {"prompt": item.prompt, "numbers": item.numbers, **about}
                    writer.add(item.file, _joined(own), line)
            with distributed.together():
                writer.check()
            there += len(pairs)
            bar.update(there)
        with distributed.together():
            writer.finish()


def read(folder: epath.Path, item: Item) -> list[np.ndarray]:
    """The images of an item, uint8 (H, W, 3). Raises ConfigError for a file that is no PNG."""
    try:
        with (folder / item.file).open("rb") as file, Image.open(file) as picture:
            whole = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{folder / item.file} cannot be read: {error}. Delete it.") from error
    if len(item.numbers) == 1:
        return [whole]
    height, width = whole.shape[0] // 2, whole.shape[1] // 2
    return [
        whole[y : y + height, x : x + width]
        for y in (0, height)
        for x in (0, width)
    ][: len(item.numbers)]  # fmt: skip


def _joined(images: Sequence[np.ndarray]) -> np.ndarray:
    """One image, or up to four in two rows of two, black where there is none."""
    if len(images) == 1:
        return images[0]
    empty = np.zeros_like(images[0])
    a, b, c, d = [*images, *[empty] * (4 - len(images))]
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def _claim(
    folder: epath.Path, about: Mapping[str, Any], items: Sequence[Item], *, alone: bool
) -> None:
    about = json.loads(json.dumps(about))
    asked = {item.file: _checksum([item.prompt, item.numbers]) for item in items}
    with distributed.together():
        try:
            was = _read_json(folder / ABOUT)
            there = _read_json(folder / ITEMS) or {}
            if was is not None:
                _refuse_others(folder, about, was, asked, there, alone=alone)
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                if was is None:
                    _write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
                if not asked.keys() <= there.keys():
                    _write_text(folder / ITEMS, json.dumps(there | asked) + "\n")
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{folder} cannot hold images: {error}.") from error


def _refuse_others(folder, about, was, asked, there, *, alone: bool) -> None:
    """Raises ConfigError where what is in a folder is not what is asked for."""
    end = "Give another --images, or delete it."
    wrong = [k for k in about if k not in _MOVES and was.get(k) != about[k]]
    if wrong:
        named = "; ".join(f"{k} = {about[k]!r}, there {was.get(k)!r}" for k in wrong)
        raise ConfigError(f"{folder} holds images that were drawn otherwise: {named}. {end}")
    other = [file for file, value in asked.items() if there.get(file, value) != value]
    if other:
        raise ConfigError(
            f"{folder} holds images of other prompts, or of other numbers, {other[0]} among "
            f"{len(other)}. {end}"
        )
    more = [file for file in there if file not in asked]
    if alone and more:
        raise ConfigError(
            f"{folder} holds {len(more)} files more than are asked for, {more[0]} among them: the "
            f"official scorer would take them for some of these. {end}"
        )


def _read_json(file: epath.Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def _write_text(file: epath.Path, text: str) -> None:
    new = file.parent / f"{file.name}.new"
    new.write_text(text)
    new.replace(file)


def _missing(folder: epath.Path, items: Sequence[Item]) -> np.ndarray:
    """Which items have no file: as process 0 sees it, for all alike."""
    folders = sorted({(folder / item.file).parent for item in items})
    there = {str(f) for parent in folders if parent.is_dir() for f in parent.iterdir()}
    gone = np.array([str(folder / item.file) not in there for item in items])
    if jax.process_count() == 1:
        return gone
    return np.asarray(multihost_utils.broadcast_one_to_all(gone))


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items that have about `size` images together."""
    part: list[Item] = []
    for item in items:
        part.append(item)
        if sum(len(one.numbers) for one in part) >= size:
            yield part
            part = []
    if part:
        yield part


class _Writer:
    """Writes images by threads, so that they are compressed beside the drawing."""

    def __init__(self, folder: epath.Path):
        self._folder, self._waiting = folder, deque[Future]()
        self._pool = ThreadPoolExecutor(_WRITERS)

    def add(self, name: str, image: np.ndarray, line: Mapping[str, Any]) -> None:
        self._waiting.append(self._pool.submit(self._write, name, image, line))

    def check(self) -> None:
        """Raises ConfigError where one could not be written; waits where too many are not yet."""
        self._settle(2 * _CHUNK)

    def finish(self) -> None:
        """All are there. Raises as `check`."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        try:
            while self._waiting and (len(self._waiting) > left or self._waiting[0].done()):
                self._waiting.popleft().result()
        except OSError as error:
            raise ConfigError(f"Images cannot be written to {self._folder}: {error}.") from error

    def _write(self, name: str, image: np.ndarray, line: Mapping[str, Any]) -> None:
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.parent / f".{file.name}.new"
        gallery.save_png(new, Image.fromarray(image), line)
        new.replace(file)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()
