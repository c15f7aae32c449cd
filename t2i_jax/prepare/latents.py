"""Encodes a data set once: posteriors of the latents, with the captions, as t2i_jax.data.latents.

Every process encodes shards of its own on its own devices. A shard is named when it is whole, so
that a killed run, started again, goes on with the next.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import json
import os
from typing import Any, NamedTuple
import uuid

from array_record.python import array_record_module
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from t2i_jax import frozen, sharding
from t2i_jax.data import buckets, images, latents, sources
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.order import NO_BUCKET
from t2i_jax.data.tar import is_remote
from t2i_jax.errors import ConfigError, users_files
from t2i_jax.progress import Progress

# Not compressed: noise does not get smaller. One record a group: access is random.
_OPTIONS = "group_size:1,uncompressed"
_OF_THE_DATA = ("image_size", "buckets", "min_image_size", "max_caption_chars", "caption_field")


class _Read(NamedTuple):
    """A sample that is to be encoded, or (pixels None) why it is not."""

    index: int
    pixels: np.ndarray | None  # uint8 (H, W, 3)
    sample: dict[str, Any]
    cause: str = ""
    detail: str = ""


def encode(
    config: ConfigDict,
    out: epath.PathLike,
    *,
    batch_size: int = 64,
    shard_size: int = 2048,
    process: tuple[int, int] = (0, 1),
) -> str:
    """Encodes all samples of `config.data` that are whole into `out`; returns what was done.

    `process` is (index, count) of the processes that share the work. Raises ConfigError where the
    directory holds other latents, or the config's autoencoder is none.
    """
    if config.autoencoder.kind == "identity":
        raise ConfigError("autoencoder.kind = 'identity': the pixels are the latents already.")
    if not config.data.center_crop or config.data.flip:
        raise ConfigError(
            "data.center_crop = False or data.flip = True: what is stored is one crop of each "
            "image, the central one, not mirrored. Set both back."
        )
    if is_remote(str(out)):
        raise ConfigError(f"--out={out}: shards are written locally; copy or mount them after.")
    config = config.copy_and_resolve_references().unlock()
    config.data.validation_size = 0  # training holds out the last ones
    config.data.original_caption_rate = float(bool(config.data.original_caption_field))  # stored
    with users_files():
        source = sources.make_source(config, "train")
    shapes, bucket_N = _shapes(config, source)
    count = -(-len(source) // shard_size)
    _claim(out, _card(config, source, count, shard_size))
    todo = [
        number
        for number in range(process[0], count, process[1])
        if not latents.shard(out, number, "json").exists()
    ]
    encoder = _Encoder(config, batch_size)
    starts = range(0, len(source), shard_size)
    shards = {number: range(len(source))[starts[number] :][:shard_size] for number in todo}
    done = 0
    with Progress(sum(map(len, shards.values())), name="encoding") as bar:
        for number, rows in shards.items():
            with futures.ThreadPoolExecutor(max(1, config.data.num_threads)) as pool:
                read = _ahead(pool, _reader(config, source, shapes, bucket_N), rows, 2 * batch_size)
                written = _Shard(out, number, source)
                for one, moments in encoder(read):
                    written.add(one, moments)
                    done += 1
                    bar.update(done)
            written.finish()
    return _describe(out, count, len(todo))


def _card(config: ConfigDict, source: sources.Mixture, shards: int, shard_size: int) -> dict:
    data = {key: config.data[key] for key in _OF_THE_DATA}
    return {
        "version": latents.VERSION,
        "shards": shards,
        "shard_size": shard_size,
        "data": {**data, "fingerprint": source.fingerprint, "samples": len(source)},
        "autoencoder": {key: config.autoencoder[key] for key in latents.AUTOENCODER},
        "originals": bool(config.data.original_caption_field),
        "weights": os.path.basename(os.path.normpath(config.weights.autoencoder)),
    }


def _claim(out: epath.PathLike, card: dict) -> None:
    """Makes `out` a directory of these latents. Raises ConfigError where it holds others."""
    path = epath.Path(out) / latents.CARD
    if path.exists():
        there, wanted = json.loads(path.read_text()), json.loads(json.dumps(card))
        if there != wanted:
            wrong = [key for key in wanted if there.get(key) != wanted[key]]
            raise ConfigError(
                f"{out} holds latents of other data or settings: {wrong[0]} is "
                f"{there.get(wrong[0])}, not {wanted[wrong[0]]}. Give another --out."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, card)


def _write(path: epath.Path, tree: Any) -> None:
    new = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    new.write_text(json.dumps(tree))
    new.replace(path)


def _shapes(config: ConfigDict, source: sources.Mixture):
    """([(height, width)], the shape of every sample or None: all have the first)."""
    if not config.data.buckets:
        return [(config.data.image_size,) * 2], None
    shapes = buckets.shapes(config.data.buckets)
    size_N2 = source.sizes(config.data.index_dir, config.data.num_threads)
    return shapes, buckets.assign(size_N2, shapes, 1)


def _reader(config: ConfigDict, source, shapes, bucket_N) -> Callable[[int], _Read]:
    least, most = config.data.min_image_size, config.data.max_caption_chars

    def read(i: int) -> _Read:
        try:
            sample = dict(source[i])
            bucket = 0 if bucket_N is None else bucket_N[i]
            if bucket == NO_BUCKET:
                source.size(i)  # says what is wrong
            sample["captions"] = tuple(text for text in sample["captions"] if text)
            if not sample["captions"]:
                raise BadSample(Cause.EMPTY_CAPTION, "every caption is empty")
            if max(map(len, sample["captions"])) > most:
                raise BadSample(Cause.LONG_CAPTION, f"a caption of more than {most} characters")
            pixels = images.resize_and_crop(sample["image"], shapes[bucket], least=least)
            return _Read(i, pixels, sample)
        except BadSample as error:
            return _Read(i, None, {}, str(error.cause), str(error))

    return read


def _ahead(pool: futures.Executor, function, items: Iterable, many: int) -> Iterator:
    """function(item) in order, `many` of them under way at once."""
    waiting: deque[futures.Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > many:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Encoder:
    """Samples in, samples with their moments out, in the same order; batches of one shape."""

    def __init__(self, config: ConfigDict, batch_size: int):
        devices = jax.local_devices()
        if batch_size % len(devices):
            raise ConfigError(
                f"--batch_size={batch_size}: not a multiple of {len(devices)} devices."
            )
        self._mesh = sharding.make_mesh(data=1, fsdp=len(devices), tensor=1, devices=devices)
        self._batch_size = batch_size
        autoencoder, self._params = frozen.load_autoencoder(config, self._mesh)

        def posterior(params, images_BHWC):
            moments = autoencoder.posterior(params, images_BHWC.astype(jnp.float32) / 127.5 - 1.0)
            both = jnp.concatenate([moments.mean, moments.logvar], axis=-1).astype(jnp.bfloat16)
            return jax.lax.bitcast_convert_type(both, jnp.uint16)

        self._posterior = jax.jit(posterior)

    def __call__(self, read: Iterable[_Read]) -> Iterator[tuple[_Read, np.ndarray | None]]:
        waiting: deque = deque()  # batches on the devices, in order
        batch: list[_Read] = []

        def flush() -> None:
            if batch:
                waiting.append((list(batch), self._start(batch)))
                batch.clear()

        for one in read:
            shape = one.pixels.shape if one.pixels is not None else None
            shapes = {b.pixels.shape for b in batch if b.pixels is not None}
            if len(batch) == self._batch_size or (shape and shapes - {shape}):
                flush()
            batch.append(one)
            while len(waiting) > 1:
                yield from self._finish(*waiting.popleft())
        flush()
        while waiting:
            yield from self._finish(*waiting.popleft())

    def _start(self, batch: list[_Read]) -> jax.Array | None:
        pixels = [one.pixels for one in batch if one.pixels is not None]
        if not pixels:
            return None
        padded = np.stack(pixels + pixels[:1] * (self._batch_size - len(pixels)))
        return self._posterior(
            self._params, jax.device_put(padded, sharding.batch_sharding(self._mesh))
        )

    def _finish(self, batch: list[_Read], made: jax.Array | None) -> Iterator:
        moments = iter(() if made is None else np.asarray(made))
        for one in batch:
            yield one, (None if one.pixels is None else next(moments))


class _Shard:
    """One shard under way; `finish` gives it its name."""

    def __init__(self, out: epath.PathLike, number: int, source: sources.Mixture):
        self._source, self._final = source, latents.shard(out, number, "array_record")
        self._summary = latents.shard(out, number, "json")
        self._partial = self._final.parent / f".{self._final.name}.partial"
        self._partial.unlink(missing_ok=True)  # of a process that was killed
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), _OPTIONS)
        self._runs: list[list] = []  # [(width, height), how many in a row]
        self._bad: list[dict[str, str]] = []

    def add(self, read: _Read, moments: np.ndarray | None) -> None:
        name = self._source.name(read.index)
        if moments is None:
            self._bad.append({"sample": name, "cause": read.cause, "detail": read.detail})
            return
        self._writer.write(latents.encode(moments, read.sample, name))
        height, width = read.pixels.shape[:2]
        if not self._runs or self._runs[-1][0] != [width, height]:
            self._runs.append([[width, height], 0])
        self._runs[-1][1] += 1

    def finish(self) -> None:
        self._writer.close()
        self._partial.replace(self._final)
        causes = Counter(entry["cause"] for entry in self._bad)
        _write(self._summary, {"runs": self._runs, "bad": causes, "names": self._bad})


def _describe(out: epath.PathLike, count: int, done: int) -> str:
    made = [latents.shard(out, i, "json") for i in range(count)]
    found = [json.loads(path.read_text()) for path in made if path.exists()]
    samples = sum(n for entry in found for _, n in entry["runs"])
    causes = sum((Counter(entry["bad"]) for entry in found), Counter())
    lines = [f"{out}: {len(found)} of {count} shards ({done} now), {samples:,} samples"]
    if causes:
        lines.append("left out: " + ", ".join(f"{n:,} {cause}" for cause, n in causes.items()))
        shown = [bad for entry in found for bad in entry["names"]][:10]
        lines += [f"  {bad['sample']}: {bad['cause']}, {bad['detail']}" for bad in shown]
        lines.append(f"by name: {epath.Path(out) / '*.json'}")
    return "\n".join(lines)
