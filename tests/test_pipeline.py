"""From a checkpoint to pictures: what is drawn, and that it does not depend on where."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from t2i_jax import pipeline, sharding
from t2i_jax.data.prompts import Prompts
from t2i_jax.diffusion import time
from t2i_jax.pipeline import Pipeline
from tests import tiny

PROMPTS = ["a red ring", "two blue squares", "a ring above a green cross"]


@pytest.fixture(scope="module")
def many(trained):
    """On all eight devices; the weights as trained, for an average of four steps shows nothing."""
    return Pipeline.load(trained, weights="params")


@pytest.fixture(scope="module")
def one(many):
    """The same on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params, frozen = jax.device_put((many.params, many.frozen), sharding.replicated(mesh))
    noisy = jax.tree.map(lambda x: x + 0.05 * np.sin(np.arange(x.size).reshape(x.shape)), params)
    return many._replace(mesh=mesh, params=noisy, frozen=frozen)


@pytest.fixture(scope="module")
def images(one):
    """Three images, each drawn alone."""
    return one.draw(PROMPTS, seed=5, batch_size=1)


def test_an_image_is_the_same_in_any_batch(one, images):
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(one.draw(PROMPTS, seed=5, batch_size=3), images)
    assert not np.array_equal(images[0], images[1])
    repeated = one.draw([PROMPTS[0]] * 2, seed=5, batch_size=1)
    np.testing.assert_array_equal(repeated[0], images[0])
    assert not np.array_equal(repeated[1], images[0])  # other noise


@pytest.mark.parametrize("process", [0, 1])
def test_one_process_tells_of_prompts_that_are_cut(one, process, monkeypatch, caplog):
    monkeypatch.setattr("jax.process_index", lambda: process)
    one._tell_cut(["a red ring", "a red ring " * 20])
    assert caplog.text.count("Only 12 tokens are read of 'a red ring a") == (process == 0)
    assert len(caplog.records) == (process == 0)


def test_an_image_is_the_same_on_eight_devices(many, one, images):
    """To one step of a byte: sums over shards may round otherwise."""
    shardings = jax.tree.map(lambda x: x.sharding, many.params)
    there = many._replace(params=jax.device_put(one.params, shardings)).draw(PROMPTS, seed=5)
    assert np.abs(there.astype(int) - images).max() <= 1
    assert (there != images).mean() < 0.01


def test_an_image_is_eulers_path_from_its_own_noise(one, images):
    """Image i starts from fold_in(seed, i); guided by the empty prompt; clipped to bytes."""
    c = one.config
    text = one.prompts.encode([PROMPTS[1], ""])
    params = {"dit": one.params["dit"], "llm": one.frozen["llm"]}
    velocity = jax.jit(
        lambda z, t: one.model.apply({"params": params}, z, t, text["ids"], text["mask"])
    )
    z = jax.random.normal(jax.random.fold_in(jax.random.key(5), 1), (16, 16, 3))
    sigmas = time.sampling_sigmas(c.sampling.steps, c.flow.num_timesteps, c.flow.shift)
    for i in range(c.sampling.steps):
        v, null = velocity(np.stack([z, z]), np.full(2, sigmas[i]))
        z = z + (sigmas[i + 1] - sigmas[i]) * (null + c.sampling.guidance * (v - null))
    expected = np.clip(np.round((np.asarray(z) + 1) * 127.5), 0, 255)
    assert np.abs(expected - images[1]).max() <= 1
    assert expected.std() > 20


def test_options(one, images):
    (picture,) = one(PROMPTS[0], seed=5)
    assert isinstance(picture, Image.Image)
    np.testing.assert_array_equal(picture, images[0])
    assert not np.array_equal(one.draw(PROMPTS[:1], seed=6)[0], images[0])
    assert not np.array_equal(one.draw(PROMPTS[:1], seed=5, guidance=1)[0], images[0])
    seen = []
    one.draw([*PROMPTS, "one more"], batch_size=3, progress=seen.append)
    assert seen == [3, 4]


def test_guidance_says_nothing_about_the_empty_prompt(one):
    plain = one.draw([""], seed=5, guidance=1).astype(int)
    assert np.abs(one.draw([""], seed=5, guidance=9.0) - plain).max() <= 1


def test_the_instruction_goes_before_prompts_but_not_before_the_empty_one(one):
    config = one.config.copy_and_resolve_references().unlock()
    config.data.instruction = "a red "
    told = one._replace(prompts=Prompts(one.prompts.tokenizer, config.data))
    assert told.prompts.length > one.prompts.length
    for prompt, whole in (("ring", "a red ring"), ("", "")):
        difference = told.draw([prompt], seed=5).astype(int) - one.draw([whole], seed=5)
        assert np.abs(difference).max() <= 1  # the rows are longer: other sums


def test_weights_are_held_as_they_are_used(many):
    """In half the memory, and not a bit of an image is another."""
    config = many.config.copy_and_resolve_references()
    config.train.dtype = "bfloat16"
    held = pipeline.as_held(jax.tree.map(jnp.copy, many.params), config, many.mesh)
    mlp, norm = held["dit"]["blocks"]["mlp"], held["dit"]["blocks"]["mlp_norm"]
    assert mlp["up"]["weight"].dtype == jnp.bfloat16
    assert norm["weight"].dtype == jnp.float32
    size = sharding.bytes_per_device
    assert 2 * size(mlp) == size(many.params["dit"]["blocks"]["mlp"])
    master, small = (many._replace(config=config, params=p) for p in (many.params, held))
    np.testing.assert_array_equal(small.draw(PROMPTS, seed=5), master.draw(PROMPTS, seed=5))


def test_the_average_is_the_default(trained, many):
    average = Pipeline.load(trained).params
    difference = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), average, many.params)
    assert max(jax.tree.leaves(difference)) > 1e-4
    earlier = Pipeline.load(trained / "checkpoints" / "2", weights="params").params
    assert not np.array_equal(*(p["dit"]["out"]["bias"] for p in (earlier, many.params)))
    assert many.config.to_dict() == tiny.config(**tiny.WATCHED).to_dict()


def test_what_cannot_be_drawn_is_refused(one, tmp_path):
    with pytest.raises(ValueError, match="No prompts"):
        one.draw([])
    with pytest.raises(ValueError, match="steps = 1001"):
        one.draw(PROMPTS, steps=1001)
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        Pipeline.load(tmp_path)
