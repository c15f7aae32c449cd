"""From a checkpoint to pictures: what is drawn, and that it does not depend on where."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import t2i_jax
from t2i_jax import options, pipeline, sharding
from t2i_jax.data.prompts import Prompts
from t2i_jax.diffusion import solvers, time
from t2i_jax.diffusion.guidance import Guidance
from t2i_jax.errors import ConfigError
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
    return np.concatenate([one.draw([p], seed=5, numbers=[i]) for i, p in enumerate(PROMPTS)])


def test_an_image_is_the_same_in_any_batch(one, images):
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(one.draw(PROMPTS, seed=5), images)
    np.testing.assert_array_equal(one.draw(PROMPTS[1:], seed=5, numbers=[1, 2]), images[1:])
    assert not np.array_equal(images[0], images[1])
    repeated = one.draw([PROMPTS[0]] * 2, seed=5)
    np.testing.assert_array_equal(repeated[0], images[0])
    assert not np.array_equal(repeated[1], images[0])  # other noise


@pytest.mark.parametrize("process", [0, 1])
def test_one_process_tells_of_prompts_that_are_cut_and_where(one, process, monkeypatch, caplog):
    monkeypatch.setattr("jax.process_index", lambda: process)
    one.tell_cut(["a red ring", *["a red ring " * 1000] * 2, ""])
    assert len(caplog.records) == (process == 0)
    if process == 0:
        assert "A prompt of 11000 characters is cut: 12 tokens are read" in caplog.text
        (told,) = caplog.records
        _, _, read, lost = told.args
        (count,) = one.prompts.read(["a red ring " * 1000])
        assert ("a red ring " * 9)[:count].endswith(read) and read
        assert ("a red ring " * 20)[count:].startswith(lost) and lost


@pytest.mark.parametrize("prompt", ["🍎🍏 " * 3, "مرحبا بالعالم", "a\u0000b", "x" * 10_000, ""])
def test_any_text_is_drawn(one, prompt):
    (image,) = one.draw([prompt], steps=1)
    assert image.shape == (16, 16, 3)


def test_an_image_is_the_same_on_eight_devices_bit_by_bit(many, one):
    """Its latents, too, in batches that are not full, and drawn by a stochastic solver."""
    shardings = jax.tree.map(lambda x: x.sharding, many.params)
    there = many._replace(params=jax.device_put(one.params, shardings))
    for how in ({}, {"solver": "ancestral"}):
        here = one.draw(PROMPTS, seed=5, decode=False, **how)
        np.testing.assert_array_equal(there.draw(PROMPTS, seed=5, decode=False, **how), here)
    assert here.dtype == np.float32 and here.shape == (3, 16, 16, 3)


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
    assert not np.array_equal(one.draw(PROMPTS[:1], seed=5, guidance_scale=1)[0], images[0])
    seen = []
    one.draw([*PROMPTS, "one more"], batch_size=2, progress=seen.append)
    assert seen == [2, 4]


def test_images_of_several_prompts_come_prompt_by_prompt(one, capsys):
    four = one(PROMPTS[:2], num_images=2, seed=5, progress=False)
    assert len(four) == 4 and not capsys.readouterr().err
    by_hand = one.draw([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, seed=5)
    np.testing.assert_array_equal(np.stack(four), by_hand)


def test_the_second_call_compiles_nothing(one):
    one.draw(PROMPTS, seed=5)
    with jax.log_compiles(True), compiled() as programs:
        one.draw(["another prompt"], seed=7, guidance_scale=2.5)
        one(PROMPTS, num_images=2, progress=False)
        assert not programs
        one.draw(PROMPTS[:1], steps=2)
        assert any("draw" in name for name in programs)


@contextlib.contextmanager
def compiled():
    """The messages of what is compiled meanwhile."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "Compiling" in record.getMessage():
                found.append(record.getMessage())

    handler = Handler()
    logging.getLogger("jax").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("jax").removeHandler(handler)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_every_solver_draws(one, images, solver):
    found = one.draw(PROMPTS[:1], seed=5, solver=solver, steps=4)
    assert found.shape == (1, 16, 16, 3)
    assert np.array_equal(found[0], one.draw(PROMPTS[:1], seed=5, steps=4)[0]) == (
        solver == "euler"
    )


def test_a_negative_prompt_stands_in_the_place_of_the_empty_one(one, images):
    """v_null + g (v - v_null) is v where both prompts are the same, whatever g."""
    same = one.draw(PROMPTS[:1], negative_prompt=PROMPTS[0], guidance_scale=7.0, seed=5)
    plain = one.draw(PROMPTS[:1], guidance_scale=1, seed=5)
    assert np.abs(same.astype(int) - plain).max() <= 1
    each = one.draw(PROMPTS, negative_prompt=["", PROMPTS[1], ""], seed=5)
    np.testing.assert_array_equal(each[[0, 2]], images[[0, 2]])
    assert not np.array_equal(each[1], images[1])
    starts = [Image.fromarray(images[0]), Image.fromarray(images[1])]
    begun = one(PROMPTS[:2], num_images=2, image=starts, progress=False, strength=0.5)
    by_hand = one.draw([PROMPTS[1]], numbers=[3], image=images[1], strength=0.5)
    np.testing.assert_array_equal(begun[3], by_hand[0])
    two = one(PROMPTS[:2], [PROMPTS[1], ""], num_images=2, progress=False)
    one_by_one = one.draw([PROMPTS[0]] * 2, negative_prompt=PROMPTS[1])
    np.testing.assert_array_equal(np.stack(two[:2]), one_by_one)


def test_latents_go_out_and_come_back(one, images):
    """Drawing starts from the noise of the image's number; here given by hand."""
    keys = [jax.random.fold_in(jax.random.key(5), i) for i in range(3)]
    noise = np.stack([jax.random.normal(key, (16, 16, 3)) for key in keys])
    np.testing.assert_array_equal(one.draw(PROMPTS, latents=noise, seed=8), images)
    latents = one.draw(PROMPTS, seed=5, decode=False)
    decoded = np.clip(np.round((latents + 1) * 127.5), 0, 255)  # pixels are this model's latents
    np.testing.assert_array_equal(decoded, images)
    np.testing.assert_array_equal(one.decode(latents), images)
    with pytest.raises(ConfigError, match="latents must be finite"):
        one.decode(latents[..., :2])


def test_every_step_can_be_looked_at_and_changed(one, images):
    seen = []
    found = one.draw(PROMPTS, seed=5, callback=lambda *step: seen.append(step))
    np.testing.assert_array_equal(found, images)
    steps = one.config.sampling.steps
    assert [number for number, _, _ in seen] == [*range(1, steps + 1)] * 3  # one image a batch
    levels = time.sampling_sigmas(steps, one.config.flow.num_timesteps, one.config.flow.shift)
    np.testing.assert_allclose([level for _, level, _ in seen], [*levels[1:]] * 3, rtol=1e-6)

    def black(number, level, latents):
        return np.full(latents.shape, -1.0) if number == steps else None

    assert one.draw(PROMPTS[:1], seed=5, callback=black).max() == 0


def test_an_image_to_start_from(one, images):
    """Of all steps the last are taken, from (1 - t) x + t n."""
    picture = Image.fromarray(images[0])
    steps = one.config.sampling.steps
    little = one.draw(PROMPTS[1:2], seed=5, image=picture, strength=1 / steps)[0].astype(int)
    much = one.draw(PROMPTS[1:2], seed=5, image=picture, strength=1.0)[0].astype(int)
    assert np.abs(little - images[0]).mean() < 0.7 * np.abs(much - images[0]).mean()
    np.testing.assert_array_equal(much, one.draw(PROMPTS[1:2], seed=5)[0])  # t = 1: noise alone
    levels = time.sampling_sigmas(steps, one.config.flow.num_timesteps, one.config.flow.shift)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), 0), (16, 16, 3))
    begun = []
    one.draw(
        PROMPTS[1:2],
        seed=5,
        image=images[:1],
        strength=2 / steps,
        callback=lambda number, level, z: begun.append((number, level, np.asarray(z))),
    )
    assert [round(level, 5) for _, level, _ in begun] == [round(float(x), 5) for x in levels[-2:]]
    x = images[0] / np.float32(127.5) - 1
    z = (1 - levels[-3]) * x + levels[-3] * noise
    assert np.abs(begun[0][2][0] - z).mean() < np.abs(begun[0][2][0] - noise).mean()
    both = one.draw(PROMPTS[:2], seed=5, image=[picture, picture.resize((40, 20))], strength=0.5)
    assert both.shape == (2, 16, 16, 3)


def test_the_first_steps_of_cfg_zero_are_left_out(one):
    """Nothing moves in them, whatever the solver: drawing starts from the same noise, later."""
    steps, levels = one.config.sampling.steps, options.resolve(one.config).levels
    chosen = options.resolve(one.config, guidance="cfg-zero")
    np.testing.assert_array_equal(chosen.levels, levels[1:])
    assert chosen.start == 1.0 and chosen.evaluations == steps - 1
    begun = []
    how = {"guidance": "cfg-zero", "solver": "dpmpp_2m", "seed": 5}
    one.draw(PROMPTS[:1], **how, callback=lambda number, level, z: begun.append(level))
    np.testing.assert_allclose(begun, levels[2:], rtol=1e-6)
    with pytest.raises(ConfigError, match="zero_steps = 9 leaves none"):
        one.draw(PROMPTS, guidance=Guidance("cfg-zero", zero_steps=9))


def test_the_package_has_the_pipeline():
    assert t2i_jax.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        t2i_jax.Pipelin  # noqa: B018


def test_other_sizes_have_other_shifts(one):
    found = one.draw(PROMPTS[:2], height=12, width=24, seed=5)
    assert found.shape == (2, 12, 24, 3)
    config = one.config
    same = options.resolve(config, height=8, width=32)  # as many pixels
    np.testing.assert_array_equal(same.levels, options.resolve(config).levels)
    large = options.resolve(config, height=32, width=32)  # four times: twice the shift
    flow, steps = config.flow, config.sampling.steps
    expected = time.sampling_sigmas(steps, flow.num_timesteps, flow.shift, 2 * flow.shift)
    np.testing.assert_allclose(large.levels, expected, rtol=1e-6)


def test_guidance_says_nothing_about_the_empty_prompt(one):
    plain = one.draw([""], seed=5, guidance_scale=1).astype(int)
    assert np.abs(one.draw([""], seed=5, guidance_scale=9.0) - plain).max() <= 1


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


WRONG = {
    "Prompts are one or more strings": {"prompts": []},
    "Prompts are one or more strings, got 'a ring'": {"prompts": "a ring"},
    "steps = 1001": {"steps": 1001},
    "solver = 'unicp' is unknown; known: euler, .* Did you mean 'unipc'": {"solver": "unicp"},
    "guidance = 'agp' is unknown; .* Did you mean 'apg'": {"guidance": "agp"},
    "guidance = 3.0 is unknown": {"guidance": 3.0},
    "guidance_scale = nan": {"guidance_scale": float("nan")},
    "guidance_interval = .* two noise levels": {"guidance_interval": (0.8, 0.2)},
    "height = 15: .* multiples of 4 pixels, .*; 12 and 16 are": {"height": 15},
    "width = 0: .*; 4 is": {"width": 0},
    "shift = -1": {"shift": -1.0},
    "strength = 0": {"image": np.zeros((4, 4, 3), np.uint8), "strength": 0.0},
    "strength = 0.5 is for an image": {"strength": 0.5},
    "steps = 2.5": {"steps": 2.5},
    "seed = 4294967296": {"seed": 2**32},
    "seed = None": {"seed": None},
    "batch_size = 0": {"batch_size": 0},
    "There is no option 'guidance_scal'. Did you mean 'guidance_scale'": {"guidance_scal": 3},
    "Prompts are one or more strings, got 5": {"prompts": 5},
    "bytes that are not UTF-8": {"prompts": ["a \udcff ring"]},
    "Negative prompts are one or more strings, got 5": {"negative_prompt": 5},
    "height = 0: .*; 4 is": {"height": 0},
    "An image is uint8": {"image": np.zeros((4, 4, 3))},
    "2 images to start from, but 3": {"image": [np.zeros((4, 4, 3), np.uint8)] * 2},
    "image and latents both": {"image": np.zeros((4, 4, 3), np.uint8), "latents": 0},
    r"latents must be finite, of shape \(3, 16, 16, 3\)": {"latents": np.zeros((2, 16, 16, 3))},
    "2 negative prompts for 3 images": {"negative_prompt": ["a", "b"]},
    "numbers must be 3": {"numbers": [0, 1]},
    "numbers must be 3, one a prompt, from 0": {"numbers": [0, 1, -1]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_drawn_is_refused(one, message):
    given = {"prompts": PROMPTS} | WRONG[message]
    with pytest.raises(ConfigError, match=message):
        one.draw(**given)


def test_where_there_is_no_model(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        Pipeline.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there are .*4|\['2', '4'\]"):
        Pipeline.load(trained / "checkpoints" / "3")


def test_weights_that_are_not_finite_are_refused(trained, monkeypatch):
    """Whatever part of the model they are in."""
    held = pipeline.as_held

    def broken(params, *args):
        held_params = held(params, *args)
        bias = held_params["dit"]["out"]["bias"]
        held_params["dit"]["out"]["bias"] = bias.at[0].set(np.nan)
        return held_params

    monkeypatch.setattr(pipeline, "as_held", broken)
    with pytest.raises(ConfigError, match=r"not finite, in 1 of its arrays: params/dit/out/bias"):
        Pipeline.load(trained)
