"""gs://: weights, tokenizers and data are read from a bucket, which a folder plays here."""

import types

from etils import epath
from etils.epath import backend
import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
import jax
import numpy as np
import pytest

from t2i_jax import convert, frozen, sharding
from t2i_jax.data import sources
from tests import archives, toys

NAME = "ablations/clip_mod"  # which reads all there is


@pytest.fixture
def bucket(tmp_path):
    """The folder that gs://bucket is, and the files that were opened in it."""
    opened = set()

    class Buckets(DirFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, finalize_on_close=True):
            super().__init__(str(tmp_path), LocalFileSystem())

        def open(self, path, *words, **options):
            opened.add(self._strip_protocol(path))
            return super().open(path, *words, **options)

    for name in Buckets.protocol:
        fsspec.register_implementation(name, Buckets, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield types.SimpleNamespace(folder=epath.Path(tmp_path) / "bucket", opened=opened)
    for name in Buckets.protocol:
        fsspec.register_implementation(name, known_implementations[name]["class"], clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_run_finds_its_weights_and_its_data_there(bucket):
    model = toys.model(NAME, bucket.folder / "source")
    for layout in ("safetensors", "diffusers"):
        convert.write(model, bucket.folder / layout, layout, "float32")
    shard = [("0.image.jpg", archives.encoded(0)), ("0.synthetic_caption.txt", b"a red ring")]
    shard += [("1.image.jpg", archives.encoded(1)), ("1.synthetic_caption.txt", b"a square")]
    archives.write_tar(bucket.folder / "data" / "0.tar", shard)

    def config(root):
        where = {"llm": "safetensors", "autoencoder": "diffusers/vae", "clip": "safetensors"}
        where |= {"tokenizer": "diffusers/tokenizer", "start": "diffusers"}
        changes = {f"weights__{name}": f"{root}/{place}" for name, place in where.items()}
        data = {"data__path": f"{root}/data/*.tar", "data__validation_size": 1}
        return toys.config(NAME, **changes, **data)

    there, here = config("gs://bucket"), config(bucket.folder)
    assert frozen.missing(there) == []
    mesh = sharding.make_mesh()
    prompts, _, params = frozen.load(there, "", mesh)
    _, _, expected = frozen.load(here, "", mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert prompts.tokenizer.rows(["red ring"], 8) == [[2, 5, 8]]  # with BOS
    assert convert.open_model(there.weights.start).parts == model.parts
    assert sources.make_source(there, "train")[0]["image"] == shard[0][1]
    files = {"bucket/safetensors/model.safetensors", "bucket/diffusers/tokenizer/tokenizer.json"}
    assert files | {"bucket/diffusers/vae/config.json"} <= bucket.opened


def test_what_is_not_there_is_named_as_it_was_given(bucket):
    config = toys.config(NAME, weights__autoencoder="gs://bucket/vae")
    (problem,) = [p for p in frozen.missing(config) if "autoencoder" in p]
    assert "No autoencoder weights in gs://bucket/vae: there is no such directory" in problem
