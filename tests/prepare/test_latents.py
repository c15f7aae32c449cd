"""Stored latents: the posterior of every image, resumable, and trained on as the images are."""

import io
import json
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2i_jax import convert, frozen, sharding
from t2i_jax.data import images, latents, sources
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError
from t2i_jax.prepare import latents as encoding
from t2i_jax.training import held_out, step
from tests import toys

NAME, COUNT = "ablations/baseline", 21
BROKEN = 5


def picture(i):
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (70, 64 + 16 * (i % 2), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, and a model with an autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i in range(COUNT):
            data = io.BytesIO()
            picture(i).save(data, "PNG")
            data = data.getvalue()[: 900 if i == BROKEN else None]
            bodies = {"png": data, "txt": f"a ring {i}".encode(), "old.txt": b"two"}
            for field, body in bodies.items():
                info = tarfile.TarInfo(f"{i:03}.{field}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    stored = toys.model(NAME, folder / "model")
    convert.write(stored, str(folder / "weights"), "safetensors", "float32")
    return folder


def config(folder, **changes):
    data = {"path": str(folder / "a.tar"), "image_field": "png", "caption_field": "txt"}
    data |= {"original_caption_field": "old.txt", "original_caption_rate": 0.5}
    data |= {"validation_size": 4, "num_threads": 2, "caption_dropout": 0.0}
    changes = {f"data__{key}": value for key, value in data.items()} | changes
    return toys.config(NAME, weights__autoencoder=str(folder / "weights"), **changes)


@pytest.fixture(scope="module")
def encoded(folder):
    out = folder / "latents"
    text = encoding.encode(config(folder), out, batch_size=8, shard_size=9)
    assert "3 of 3 shards (3 now), 20 samples" in text
    assert "1 truncated_image" in text and "a.tar/005: truncated_image" in text
    return out


def test_every_whole_sample_is_there_with_its_posterior(folder, encoded):
    source = latents.Latents(encoded)
    assert len(source) == COUNT - 1 and source.bad == {"truncated_image": 1}
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    autoencoder, params = frozen.load_autoencoder(config(folder), mesh)
    for i, original in enumerate(k for k in range(COUNT) if k != BROKEN):
        sample = source[i]
        assert sample["captions"] == (f"a ring {original}",) == (source.caption(i),)
        assert sample["original_caption"] == "two"
        assert source.size(i) == (64, 64)
        pixels = images.resize_and_crop(np.asarray(picture(original)), 64)[None]
        moments = autoencoder.posterior(params, jnp.asarray(pixels, "f4") / 127.5 - 1)
        stored = sample["moments"].view(jnp.bfloat16).astype("f4")
        both = np.concatenate([moments.mean[0], moments.logvar[0]], -1)
        np.testing.assert_allclose(stored, both, rtol=2**-7, atol=1e-3)


def test_a_killed_run_goes_on(folder, encoded, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    add = encoding._Shard.add

    def killed(self, read, moments):
        if read.index == 13:
            raise KeyboardInterrupt
        add(self, read, moments)

    monkeypatch.setattr(encoding._Shard, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        encoding.encode(config(folder), out, batch_size=8, shard_size=9)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="2 of 3 shards are not encoded yet"):
        latents.Latents(out)
    assert "(2 now)" in encoding.encode(config(folder), out, batch_size=8, shard_size=9)
    one, other = latents.Latents(out), latents.Latents(encoded)
    for i in range(COUNT - 1):
        np.testing.assert_array_equal(one[i]["moments"], other[i]["moments"])
    assert not [p.name for p in out.iterdir() if p.name.startswith(".") and ".json" in p.name]
    with pytest.raises(ConfigError, match=r"shard_size is 9, not 10"):
        encoding.encode(config(folder), out, batch_size=8, shard_size=10)


def test_processes_share_the_work(folder, encoded, tmp_path):
    out = tmp_path / "shared"
    first = encoding.encode(config(folder), out, batch_size=8, shard_size=9, process=(0, 2))
    assert "2 of 3 shards (2 now)" in first
    second = encoding.encode(config(folder), out, batch_size=8, shard_size=9, process=(1, 2))
    assert "3 of 3 shards (1 now), 20 samples" in second
    assert latents.Latents(out).fingerprint == latents.Latents(encoded).fingerprint


def stored_config(folder, encoded, **changes):
    data = {"data__source": "latents", "data__path": str(encoded)}
    return config(folder, **data | changes)


def test_training_samples_from_the_posterior(folder, encoded):
    """The step's latents are (mean + std noise - shift) scale of the very rows of the batch."""
    c = stored_config(folder, encoded)
    source = sources.make_source(c, "train")
    assert len(source) == COUNT - 1 - 4
    prompts = Prompts(Tokenizer.load(folder / "model" / "tokenizer"), c.data)
    one = Loader(source, prompts, c.data, 8, c.seed)
    batch = one.batch(0).arrays
    stored = latents.Latents(encoded)
    expected = np.stack([stored[i]["moments"] for i in one.indices(0)])
    np.testing.assert_array_equal(batch["moments"], expected)
    assert batch["moments"].shape == (8, 8, 8, 8) and batch["moments"].dtype == np.uint16
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    autoencoder, _ = frozen.load_autoencoder(c, mesh)
    objective = step.Objective(None, autoencoder, 1000, 1.0, 0.0, 1.0)
    keys = jax.random.split(jax.random.key(3), 2000)
    draws = jax.vmap(lambda key: objective.latents({}, batch, key))(keys)
    both = expected.view(jnp.bfloat16).astype("f4")
    mean, std = both[..., :4], np.exp(0.5 * both[..., 4:])
    section = c.autoencoder
    error = (draws.mean(0) - (mean - section.shift) * section.scale) / (std * section.scale)
    assert np.abs(error).max() < 6 / 2000**0.5  # 2,048 values: five standard deviations
    np.testing.assert_allclose(draws.std(0), std * section.scale, rtol=0.1)


def test_buckets_are_encoded_in_their_shapes(folder, tmp_path):
    shapes = {"data__buckets": ("64x64", "80x64"), "data__index_dir": str(tmp_path)}
    out = tmp_path / "buckets"
    encoding.encode(config(folder, **shapes), out, batch_size=8, shard_size=9)
    source = latents.Latents(out)
    wide = [i % 2 == 1 for i in range(COUNT) if i != BROKEN]
    assert [source.size(i) for i in range(20)] == [(80, 64) if w else (64, 64) for w in wide]
    assert {source[i]["moments"].shape for i in range(20)} == {(8, 8, 8), (8, 10, 8)}
    c = stored_config(folder, out, **shapes, data__validation_size=0, validation__every=0)
    prompts = Prompts(Tokenizer.load(folder / "model" / "tokenizer"), c.data)
    one = Loader(sources.make_source(c, "train"), prompts, c.data, 4, c.seed)
    for number in range(8):
        height, width = one.shape(number)
        assert one.batch(number).arrays["moments"].shape == (4, height // 8, width // 8, 8)
    large = Loader(sources.make_source(c, "train"), prompts, c.data, 16, c.seed)
    for number in range(4):  # larger than a bucket: none is given to another
        height, width = large.shape(number)
        assert large.batch(number).arrays["moments"].shape == (16, height // 8, width // 8, 8)
    stored = sources.make_source(stored_config(folder, out, **shapes), "validation")
    looked_at = held_out.validation_samples(c, stored)
    assert [stored.size(i) for i in looked_at] == [(64, 64)] * 2 and len(stored) == 4


def test_latents_of_other_settings_are_refused(folder, encoded, tmp_path):
    with pytest.raises(ValueError, match=r"data\.image_size = 32, but the latents .* with 64"):
        sources.make_source(stored_config(folder, encoded, data__image_size=32), "train")
    bare = tmp_path / "bare"
    encoding.encode(
        config(folder, data__original_caption_field="", data__original_caption_rate=0.0),
        bare,
        batch_size=8,
    )
    with pytest.raises(ValueError, match=r"original_caption_rate > 0, but the latents"):
        sources.make_source(stored_config(folder, bare), "train")
    with pytest.raises(FileNotFoundError, match=r"no latents\.json.*prepare\.py latents"):
        sources.make_source(stored_config(folder, tmp_path), "train")
    with pytest.raises(ConfigError, match="not mirrored"):
        encoding.encode(config(folder, data__flip=True), tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "latents.json").write_text(json.dumps({"version": 7}))
    with pytest.raises(ValueError, match="version 7, 1 is read"):
        latents.Latents(broken)


def test_a_shard_that_was_cut_is_noticed(folder, encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "copy")
    path = copy / "00001.array_record"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="00001"):
        latents.Latents(copy)
