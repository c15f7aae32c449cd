"""What is exported for diffusers, run in torch, draws what we draw."""

from diffusers import DiffusionPipeline
import jax
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from t2i_jax import build, convert
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.pipeline import Pipeline
from tests import files, toys

PROMPTS = ["a red ring above a blue square", "two small ring", "a <bos> green"]


@pytest.fixture(autouse=True, scope="module")
def modules_cache(tmp_path_factory):
    """Where diffusers keeps the code that a pipeline brings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
        yield


def noise(config, count, seed, size=None):
    """The initial noise that our pipeline takes: (B, H, W, C), of latents of a size."""
    key, shape = jax.random.key(seed), build.latent_shape(config)
    shape = (*(size or shape[:2]), shape[2])
    each = [jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(count)]
    return np.stack(each)


def in_torch(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, latents, **options):
    """uint8 (B, H, W, 3) of `PROMPTS`."""
    latents = torch.tensor(latents.transpose(0, 3, 1, 2))
    images = pipe(PROMPTS, latents=latents, output_type="np", **options).images
    return np.round(255 * images).astype(int)


FURTHER = [  # choices that no config of the study makes
    ("fusion_2b_gemma2", {"llm__softcap_shared": True}),
    ("ablations/cross_attention", {"llm__softcap_shared": True, "llm__softcap": 0.5}),
    ("fusion_2b", {"dit__prediction": "data", "flow__shift": 1.0, "flow__num_timesteps": 500}),
    ("ablations/clip_mod", {"data__instruction": "a small ", "data__max_text_tokens": 4}),
    ("ablations/gemma_2", {"data__image_size": 80}),
    ("ablations/clip_mod", {"clip__projection_width": 0, "dit__pooled_width": 24}),
]


@pytest.mark.parametrize(
    "name, changes", [*((name, {}) for name in toys.STRUCTURES), *FURTHER], ids=str
)
def test_every_configuration(tmp_path, name, changes):
    model = toys.model(name, tmp_path / "source", **changes)
    folder = convert.write(model, tmp_path / "out", "diffusers", "float32")
    ours, pipe = Pipeline.load(folder), in_torch(folder)
    ids, mask = pipe.tokenize([*PROMPTS, ""])
    expected = ours.prompts.encode([*PROMPTS, ""])
    np.testing.assert_array_equal(ids, expected["ids"])
    np.testing.assert_array_equal(mask, expected["mask"])
    images = ours.draw(PROMPTS, seed=3)
    assert images.std() > 20 and np.mean((images > 0) & (images < 255)) > 0.5
    assert np.abs(images[0].astype(int) - images[1]).mean() > 1
    drawn = draw(pipe, noise(ours.config, len(PROMPTS), 3))
    assert np.abs(drawn - images).max() <= 1


def test_the_pipeline_in_torch(tmp_path):
    """What a call takes: guidance, steps, sizes, negative prompts, a callback, kinds of output."""
    model = toys.model("fusion_2b_gemma2", tmp_path / "source")
    folder = convert.write(model, tmp_path / "out", "diffusers", "float32")
    ours, pipe = Pipeline.load(folder), in_torch(folder)
    latents = noise(ours.config, len(PROMPTS), 0)
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0, "steps": 7}):
        theirs = {"num_inference_steps": options.get("steps")}
        drawn = draw(pipe, latents, guidance_scale=options["guidance_scale"], **theirs)
        assert np.abs(drawn - ours.draw(PROMPTS, seed=0, **options)).max() <= 1
    default = draw(pipe, latents)
    other = draw(pipe, latents, negative_prompt="two blue ring")
    assert np.abs(default - other).max() > 1
    assert np.abs(other - ours.draw(PROMPTS, negative_prompt="two blue ring")).max() <= 1
    each = draw(pipe, latents, negative_prompt=["two blue ring", "", "two blue ring"])
    assert np.abs(each - np.where([[[[True]]], [[[False]]], [[[True]]]], other, default)).max() <= 1
    wide = noise(ours.config, len(PROMPTS), 0, (4, 16))
    drawn = draw(pipe, wide, height=32, width=128)
    assert np.abs(drawn - ours.draw(PROMPTS, height=32, width=128)).max() <= 1
    large = noise(ours.config, len(PROMPTS), 0, (12, 8))
    drawn = draw(pipe, large, height=96, width=64)
    assert np.abs(drawn - ours.draw(PROMPTS, height=96, width=64)).max() <= 1
    assert np.abs(draw(pipe, latents) - default).max() == 0  # sizes leave nothing behind
    with pytest.raises(ValueError, match="2 negative prompts for 3 images"):
        draw(pipe, latents, negative_prompt=["a", "b"])

    calls = []

    def callback(pipe, step, timestep, given):
        calls.append(step)
        return {"latents": 0 * given["latents"]} if step == 3 else {}

    tall = pipe("a red ring", height=96, width=48, callback_on_step_end=callback)
    assert tall.images[0].size == (48, 96) and calls == [0, 1, 2, 3]
    generator = torch.Generator().manual_seed(0)
    several = pipe("a ring", num_images_per_prompt=2, generator=generator, output_type="latent")
    assert several.images.shape == (2, 4, 8, 8) and several.images[0].ne(several.images[1]).any()
    with pytest.raises(ValueError, match="must be multiples of 16"):
        pipe("a ring", height=40)

    half = in_torch(folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert np.abs(draw(half, latents) - default).mean() < 10


def test_chat_templates_and_instructions(tmp_path):
    """Rows of ids, where the prompt is a turn of a chat that begins with an instruction."""
    model = toys.model("fusion_2b", tmp_path / "source")
    pipe = in_torch(convert.write(model, tmp_path / "out", "diffusers", "float32"))
    files.write_chat(tmp_path / "chat", ["a red ring", "two small rings, imagine"])
    pipe.tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "chat")
    data = toys.config("fusion_2b").data.copy_and_resolve_references()
    prompts = ["a red ring", "", "one <end_of_turn> two", "a very long prompt of many words " * 9]
    for chat, generation in ((False, False), (True, False), (True, True)):
        changes = {"chat_template": chat, "add_generation_prompt": generation}
        changes |= {"instruction": "Imagine: ", "max_text_tokens": 40}
        data.update(changes)
        pipe.register_to_config(**changes)
        expected = Prompts(Tokenizer.load(tmp_path / "chat"), data).encode(prompts)
        ids, mask = pipe.tokenize(prompts)
        np.testing.assert_array_equal(ids, expected["ids"])
        np.testing.assert_array_equal(mask, expected["mask"])


def test_a_model_of_pixels(tmp_path, trained):
    """The demo's kind: no VAE, an LLM of its own."""
    folder = convert.write(convert.open_model(trained), tmp_path / "out", "diffusers", "float32")
    ours, pipe = Pipeline.load(trained), in_torch(folder)
    prompts = ["a red ring", "two blue squares"]
    latents = torch.tensor(noise(ours.config, 2, 0).transpose(0, 3, 1, 2))
    images = pipe(prompts, latents=latents, output_type="np").images
    assert np.abs(np.round(255 * images) - ours.draw(prompts, seed=0)).max() <= 1


def test_the_code_is_run_only_where_it_is_trusted(tmp_path):
    """And it is where diffusers fetches it from a repository: one file a component."""
    model = toys.model("fusion_2b", tmp_path / "source")
    folder = convert.write(model, tmp_path / "out", "diffusers", "float32")
    code = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.py")}
    assert code == {"fused_pipeline.py", "transformer/fused_transformer.py"}
    assert "from ." not in (folder / "transformer" / "fused_transformer.py").read_text()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(str(folder))
