"""Pictures and prompts to features: order, padding, devices, files; and FID from end to end."""

import io

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from t2i_jax import sharding
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation import features, preprocess
from t2i_jax.evaluation.distances import clip_score, cmmd, frechet
from t2i_jax.evaluation.features import Extractor
from t2i_jax.evaluation.statistics import Statistics
from t2i_jax.interop import inception
from t2i_jax.interop.clip_model import load_clip_model
from t2i_jax.interop.directory import shapes_of
from t2i_jax.models.inception import Inception
from tests import files

RNG = np.random.default_rng(0)
SMOOTH = np.linspace(0, 255, 64)[:, None, None] * np.ones((1, 48, 3))


def pictures(n):
    """uint8 (n, 64, 48, 3), each of another colour and slope."""
    return np.stack([SMOOTH * RNG.uniform(0.3, 1, 3) for _ in range(n)]).astype(np.uint8)


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def extractor(mesh=None, **options):
    """Of a number i the features (2 i, 3 i), with a batch of eight."""
    mesh = sharding.make_mesh() if mesh is None else mesh
    reads = jax.ShapeDtypeStruct((2,), np.int32)

    def prepare(i):
        return np.array([i, i], np.int32)

    options = {"batch_size": 5} | options
    return Extractor(prepare, lambda w, x: x * w, np.array([2, 3]), mesh, reads, **options)


@pytest.mark.parametrize("n", [1, 8, 21])
def test_every_item_has_its_row(n):
    """Whatever remains of the last batch, of a list or of a generator, with one program."""
    made, told = extractor(), []
    assert made.batch_size == 8
    expected = np.arange(n)[:, None] * np.float32([2, 3])
    np.testing.assert_array_equal(made(range(n), progress=told.append), expected)
    assert told == [*range(8, n, 8), n]
    parts = list(made.stream(i for i in range(n)))
    assert [len(part) for part in parts] == [8] * (n // 8) + [n % 8] * (n % 8 > 0)
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert parts[0].dtype == np.float32 and made._run._cache_size() == 1


def test_no_more_is_read_than_is_soon_needed():
    read = []
    items = (read.append(i) or i for i in range(100))
    parts = extractor(threads=2).stream(items)
    next(parts)
    assert len(read) == 8 * (1 + features._AHEAD)
    parts.close()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        extractor()([])
    with pytest.raises(ConfigError, match="batch_size = 0"):
        extractor(batch_size=0)


def test_a_picture_is_an_array_bytes_or_a_file(tmp_path):
    image = pictures(1)[0]
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    (tmp_path / "a.png").write_bytes(png.getvalue())
    for picture in (image, png.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(features.pixels(picture), image)
    (tmp_path / "b.png").write_bytes(png.getvalue()[:99])
    for name, text in (("b.png", "truncated"), ("c.png", "No such file")):
        with pytest.raises(ConfigError, match=text) as error:
            features.pixels(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name} cannot be measured")


def test_features_are_kept_in_files(tmp_path):
    made = RNG.normal(size=(4, 3)).astype("f4")
    features.save(tmp_path / "a.npz", made)
    np.testing.assert_array_equal(features.load(tmp_path / "a.npz"), made)
    np.savez(tmp_path / "b.npz", mu=made)
    with pytest.raises(ValueError, match=r"no feats .* holds \['mu'\]"):
        features.load(tmp_path / "b.npz")


def test_clip_embeds_on_any_devices(tmp_path):
    """Eight devices, one, and the networks by themselves; scores of the embeddings."""
    images, prompts = pictures(5), ["a red cat", "", "red " * 20, "cat", "a"]
    folder = files.write_clip_model(tmp_path / "clip")
    made = {}
    for name, mesh in (("eight", None), ("one", one_device())):
        pair = features.clip(folder, mesh, batch_size=4)
        made[name] = pair[0](images), pair[1](prompts)
    model = load_clip_model(folder)
    read = np.stack([preprocess.for_clip(image, model.pictures) for image in images])
    tokens = files.clip_vocabulary()
    ids = np.full((5, 9), tokens[files.END])  # which pads, too
    ids[:, 0] = tokens[files.START]
    for row, words in zip(ids, (["a</w>", "red</w>", "cat</w>"], [], 7 * ["red</w>"], ["cat</w>"],
                                ["a</w>"]), strict=True):  # fmt: skip
        row[1 : 1 + len(words)] = [tokens[word] for word in words]
    networks = (model.vision, model.params["vision"], read), (model.text, model.params["text"], ids)
    for k, (net, params, inputs) in enumerate(networks):
        expected = np.asarray(jax.jit(net.apply)({"params": params}, inputs))
        assert expected.shape == (5, 10) and np.ptp(expected, axis=0).min() > 1e-3
        for name in made:
            np.testing.assert_allclose(made[name][k], expected, rtol=1e-4, atol=1e-5)
    assert clip_score(*made["eight"]).n == 5
    assert cmmd(made["eight"][0], made["one"][0]).value < 1e-6


def test_directories_of_clip_that_do_not_fit_are_refused(tmp_path):
    folder = files.write_clip_model(tmp_path)
    (folder / "vocab.json").unlink()
    with pytest.raises(ConfigError, match=r"No tokenizer: .*openai/clip-vit-large-patch14"):
        features.clip(folder)
    with pytest.raises(ConfigError, match="no such directory"):
        features.clip(tmp_path / "none")
    with pytest.raises(ConfigError, match="No Inception weights"):
        features.inception(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Inception with weights of a scale that keeps activations near one, by their names."""
    tensors = {}
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    for path, shape in shapes_of(Inception().init, image).items():
        rule = inception._rule(path)
        if path.endswith("/weight"):
            x = RNG.normal(size=shape, scale=(2 / np.prod(shape[:3])) ** 0.5)
            x = x.transpose(3, 2, 0, 1)
        else:
            x = RNG.uniform(*((0.5, 1.5) if rule.theirs[-3:] in ("var", "ght") else (-0.3, 0.3)),
                            size=shape)  # fmt: skip
        tensors[rule.theirs] = np.ascontiguousarray(x, np.float32)
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(tensors, file)
    return file


def test_fid_from_end_to_end(weights):
    """Of a set with itself nothing, of noisier pictures more; on eight devices as by itself."""
    images = pictures(8)
    noise = RNG.normal(size=images.shape)
    sets = [(images + scale * noise).clip(0, 255).astype(np.uint8) for scale in (0, 10, 60)]
    made = features.inception(weights, batch_size=8)
    found = [made(one) for one in sets]
    assert found[0].shape == (8, 2048)
    net, params = inception.load_inception(weights)
    read = np.stack([preprocess.for_inception(image) for image in images[:2]])
    expected = np.asarray(jax.jit(net.apply)({"params": params}, read))
    error = np.linalg.norm(found[0][:2] - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    clean, little, much = (Statistics.of(one[:, :64]) for one in found)
    scale = np.trace(clean.covariance)
    distances = [frechet(other, clean) for other in (clean, little, much)]
    assert distances[0] < 1e-6 * scale < distances[1] < distances[2]
