"""Features of pictures and prompts: files or arrays in, float32 rows out, over all devices.

    pictures, prompts = features.clip("weights/clip-vit-large-patch14")
    with Progress(len(paths), name="CLIP") as bar:
        embeddings = pictures(paths, progress=bar.update)

Threads of the host decode and resize, some batches ahead of the devices. A network is compiled for
one shape: the last batch is filled up with zeros, whose features are dropped. Batches are split
over all devices, and parameters are whole on each. Of several processes every one is given all
items, reads those of its own rows, and gets the features of all; what one cannot read ends all.

Products are taken in full float32 on every device: TPUs and GPUs left alone would round what they
multiply, and features are compared with those that others have made.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import functools
import io
import itertools
import os
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from t2i_jax import distributed, sharding
from t2i_jax.data import images
from t2i_jax.data.bad import BadSample
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError, users_files
from t2i_jax.evaluation import preprocess
from t2i_jax.evaluation.statistics import read_arrays
from t2i_jax.interop.clip_model import load_clip_model
from t2i_jax.interop.directory import fetch_command
from t2i_jax.interop.inception import load_inception
from t2i_jax.models.inception import SIZE

Picture = np.ndarray | bytes | epath.PathLike  # uint8 (H, W, 3), an encoded image, a file of one

_AHEAD = 2  # batches that are made while the devices have one
_PER_DEVICE = 32  # items of a batch, by default
_KEY = "feats"  # of files of features, as clean-fid has it


class Extractor:
    """What makes a row of features of each item.

    Args:
      prepare: an item -> the array that the network reads of it; called in threads.
      network: (parameters, batch of such arrays) -> features (B, D); to be compiled.
      params: replicated over the mesh.
      mesh: the devices.
      reads: shape and dtype of what `prepare` makes.
      batch_size: items at a time, rounded up to what splits over the devices; default: 32 for each.
      threads: of the host; default: one a core.
    """

    def __init__(
        self,
        prepare: Callable[[Any], np.ndarray],
        network: Callable[[Any, jax.Array], jax.Array],
        params: Any,
        mesh: Mesh,
        reads: jax.ShapeDtypeStruct,
        *,
        batch_size: int | None = None,
        threads: int | None = None,
    ):
        shards = sharding.batch_shards(mesh)
        batch_size = _PER_DEVICE * shards if batch_size is None else batch_size
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size} is not a positive number.")
        self.batch_size = -(-batch_size // shards) * shards
        self._prepare, self._params, self._mesh, self._reads = prepare, params, mesh, reads
        self._threads = threads or os.cpu_count()

        @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
        def run(params, batch):
            with jax.default_matmul_precision("highest"):
                return network(params, batch).astype(jnp.float32)

        self._run = run

    def __call__(
        self, items: Iterable[Any], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Features of all items: (n, D), float32. Raises ValueError for none, else as `stream`."""
        batches = list(self.stream(items, progress=progress))
        if not batches:
            raise ValueError("There is nothing to make features of.")
        return np.concatenate(batches)

    def stream(
        self, items: Iterable[Any], *, progress: Callable[[int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Features of the items in their order, a batch at a time.

        `progress`, if given, is called with the number of items done so far. Raises ConfigError
        that names a file that is missing, or no picture.
        """
        done = 0
        for count, batch in self._batches(items):
            with jax.set_mesh(self._mesh):
                features = self._run(self._params, sharding.shard_batch(batch, self._mesh))
            features = np.asarray(features)[:count]
            done += count
            if progress:
                progress(done)
            yield features

    def _batches(self, items: Iterable[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """(Items in the whole batch, this process's rows of it)."""
        rows = sharding.local_rows(self._mesh, self.batch_size)
        items, waiting = iter(items), collections.deque()
        with futures.ThreadPoolExecutor(self._threads) as pool:
            while True:
                while len(waiting) <= _AHEAD:
                    chunk = list(itertools.islice(items, self.batch_size))
                    if not chunk:
                        break
                    mine = [chunk[row] for row in rows if row < len(chunk)]
                    waiting.append((len(chunk), [pool.submit(self._prepare, x) for x in mine]))
                if not waiting:
                    return
                count, made = waiting.popleft()
                batch = np.zeros((len(rows), *self._reads.shape), self._reads.dtype)
                with distributed.together():
                    for i, one in enumerate(made):
                        batch[i] = one.result()
                yield count, batch


def inception(path: epath.PathLike, mesh: Mesh | None = None, **options: Any) -> Extractor:
    """Pictures -> the 2048 features of FID and KID; `path` as of `load_inception`.

    `mesh` is by default over all devices; options as of `Extractor`. Raises ConfigError that says
    what is wrong with the file.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    with users_files():
        net, params = load_inception(path, sharding.replicated(mesh))

    def network(params, images_BHWC):
        return net.apply({"params": params}, images_BHWC)

    def prepare(picture):
        return preprocess.for_inception(pixels(picture))

    reads = jax.ShapeDtypeStruct((SIZE, SIZE, 3), np.float32)
    return Extractor(prepare, network, params, mesh, reads, **options)


def clip(
    path: epath.PathLike, mesh: Mesh | None = None, **options: Any
) -> tuple[Extractor, Extractor]:
    """CLIP's embeddings, not normalised, of pictures and of prompts; `path` as `load_clip_model`.

    Of a prompt what goes beyond CLIP's 77 tokens is not read. `mesh` and options as of `inception`.
    Raises ConfigError that says what is wrong in the directory.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    with users_files():
        model = load_clip_model(path, sharding.replicated(mesh))
        tokenizer = Tokenizer.load(model.directory, fetch_command(path, "clip_model"))
    text, vision = model.text, model.vision
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"The tokenizer in {os.fspath(model.directory)} has {tokenizer.vocab_size} tokens, but "
            f"its model {text.vocab_size}."
        )

    def read_pictures(params, images_BHWC):
        return vision.apply({"params": params}, images_BHWC)

    def read_prompts(params, ids_BT):
        return text.apply({"params": params}, ids_BT)

    def picture(item):
        return preprocess.for_clip(pixels(item), model.pictures)

    def prompt(item):
        return tokenizer.encode([item], text.max_tokens)[0][0]

    image = jax.ShapeDtypeStruct((vision.image_size, vision.image_size, 3), np.float32)
    ids = jax.ShapeDtypeStruct((text.max_tokens,), np.int32)
    return (
        Extractor(picture, read_pictures, model.params["vision"], mesh, image, **options),
        Extractor(prompt, read_prompts, model.params["text"], mesh, ids, **options),
    )


def pixels(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3), upright, decoded as for training. Raises ConfigError that names a file."""
    if isinstance(picture, np.ndarray | bytes):
        return images.decode(picture)
    try:
        return images.decode(epath.Path(picture).read_bytes())
    except (BadSample, OSError) as error:
        raise ConfigError(f"{os.fspath(picture)} cannot be measured: {error}") from error


def save(path: epath.PathLike, features_ND: np.ndarray) -> None:
    """Writes features to an .npz file, whose 'feats' clean-fid's KID reads, too."""
    file = io.BytesIO()
    np.savez(file, **{_KEY: features_ND})
    epath.Path(path).write_bytes(file.getvalue())


def load(path: epath.PathLike) -> np.ndarray:
    """Features (n, D) that `save` or clean-fid wrote. Raises as `Statistics.load`."""
    found = read_arrays(path)
    if _KEY not in found or found[_KEY].ndim != 2:
        raise ValueError(f"{os.fspath(path)} has no {_KEY} (n, D); it holds {list(found)}.")
    return found[_KEY]
