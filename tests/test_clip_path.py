"""CLIP's embedding on its way: files, captions, batches, training inputs, pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import build, frozen, sharding
from t2i_jax.data import loader, sources
from t2i_jax.errors import ConfigError
from t2i_jax.models.fusion import TextToImageModel
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop, step
from tests import files, tiny

WIDTH = files.CLIP["projection_width"]
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run that reads CLIP, of 77 positions and the vocabulary of its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    files.write_clip(folder / "tokenizer")
    sizes = {"vocab_size": len(files.clip_vocabulary()), "max_tokens": 77}
    theirs = {"vocab_size": sizes["vocab_size"], "max_position_embeddings": 77}
    files.write_clip_weights(folder / "text_encoder", files.CLIP_JSON | theirs)
    clip = {f"clip__{name}": value for name, value in (files.CLIP | sizes).items()}
    return tiny.config(dit__pooled_width=WIDTH, weights__clip=str(folder), **clip)


@pytest.fixture(scope="module")
def parts(config, trained):
    """(prompts, frozen parameters), with the tokenizer and the LLM of a finished run."""
    prompts, _, params = frozen.load(config, trained, sharding.make_mesh())
    return prompts, params


def pool(config, parts, captions):
    """CLIP's embedding of captions, by the network alone."""
    prompts, params = parts
    ids = prompts.encode(captions)["clip_ids"]
    host = jax.tree.map(np.asarray, params["clip"])
    return np.asarray(build.clip(config).apply({"params": host}, ids))


def test_only_a_model_that_uses_clip_reads_it(config, parts, trained):
    _, params = parts
    assert params.keys() == {"llm", "clip", "autoencoder"}
    assert params["clip"]["blocks"]["mlp_up"]["weight"].sharding.spec[1] == "fsdp"
    _, _, params = frozen.load(tiny.config(), trained, sharding.make_mesh())
    assert params.keys() == {"llm", "autoencoder"} and build.clip(tiny.config()) is None
    assert "clip" not in build.abstract_params(tiny.config())[1]
    assert build.abstract_params(config)[1].keys() == {"llm", "clip", "autoencoder"}


def test_batches_carry_clips_tokens_of_the_same_caption(config, parts):
    prompts, _ = parts
    source = sources.make_source(config, "train")
    with loader.Loader(source, prompts, config.data, 32, config.seed) as batches:
        batch = batches.batch(0).arrays
    assert batch["clip_ids"].shape == (32, 77)
    dropped = batch["mask"].sum(1) == 1
    assert 0 < dropped.sum() < 32
    captions = [prompts.tokenizer.decode(ids) for ids in batch["ids"]]
    long = batch["mask"].all(axis=1)  # cut for the LLM, not for CLIP
    expected = prompts.encode(captions)["clip_ids"]
    np.testing.assert_array_equal(batch["clip_ids"][~long], expected[~long])
    empty = files.clip_vocabulary()[files.END]
    assert (batch["clip_ids"][dropped, 1:] == empty).all()


def test_training_reads_the_embedding_without_a_gradient(config, parts):
    prompts, params = parts
    run = tiny.run()
    objective = dataclasses.replace(run.objective, clip=build.clip(config))
    captions = ["a red cat", ""] * 8
    batch = {**run.batch, "clip_ids": prompts.encode(captions)["clip_ids"]}
    clip = jax.tree.map(np.asarray, params["clip"])

    @jax.jit
    def prepare(clip):
        return objective.prepare({**run.frozen, "clip": clip}, batch, KEY)

    inputs = prepare(clip)
    np.testing.assert_allclose(inputs["pooled"], pool(config, parts, captions), rtol=1e-4)
    parts_of_4 = step.split_batch(inputs, 4)
    np.testing.assert_array_equal(parts_of_4["pooled"][1], inputs["pooled"][1::4])
    grads = jax.jit(jax.grad(lambda clip: prepare(clip)["pooled"].sum()))(clip)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads))
    assert run.objective.prepare(run.frozen, run.batch, KEY)["pooled"] is None


class Sum(TextToImageModel):
    """A model whose velocity is the sum of the pooled embedding, everywhere."""

    def denoise(self, z_BHWC, t_B, memory):
        total_B = 0.01 * jnp.sum(memory.pooled_BP, axis=-1)
        return jnp.broadcast_to(total_B[:, None, None, None], z_BHWC.shape)


def test_pictures_are_guided_by_the_embeddings_of_prompt_and_null(
    config, parts, trained, monkeypatch
):
    """The path from 1 to 0 adds up to minus the guided velocity, whatever its steps."""
    prompts, params = parts
    plain = Pipeline.load(trained)
    fields = [f.name for f in dataclasses.fields(TextToImageModel)]
    names = [name for name in fields if name not in ("parent", "name")]
    model = Sum(**{name: getattr(plain.model, name) for name in names})
    monkeypatch.setattr(build, "model", lambda config: model)
    changes = {"config": config, "prompts": prompts, "frozen": params}
    captions = ["a red cat", "a cat"]
    images = plain._replace(**changes).draw(captions, seed=5, guidance_scale=3.0)
    pooled = 0.01 * pool(config, parts, [*captions, ""]).sum(-1)
    assert np.ptp(pooled) > 0.01
    for i, image in enumerate(images):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (16, 16, 3))
        x = noise - (pooled[-1] + 3.0 * (pooled[i] - pooled[-1]))
        expected = np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255)
        assert np.abs(expected - image).max() <= 1


def test_a_run_with_clip_trains_and_draws(config, tmp_path):
    final = loop.train(config, tmp_path)
    assert final.step == config.train.steps
    assert final.params["dit"]["time_embed"]["pooled_norm"]["weight"].shape == (WIDTH,)
    pipeline = Pipeline.load(tmp_path, weights="params")
    noisy = jax.tree.map(
        lambda x: x + 0.3 * np.sin(np.arange(x.size).reshape(x.shape)), pipeline.params
    )
    pipeline = pipeline._replace(params=noisy)
    images = pipeline.draw(["a red cat"], seed=5, guidance_scale=1).astype(int)
    changed = jax.tree.map(np.asarray, pipeline.frozen["clip"])
    changed["projection"]["weight"] = -changed["projection"]["weight"]
    other = pipeline._replace(frozen={**pipeline.frozen, "clip": changed})
    assert np.abs(other.draw(["a red cat"], seed=5, guidance_scale=1) - images).max() > 1


def test_what_is_missing_or_does_not_fit_is_named(config, trained, tmp_path):
    def changed(**values):
        c = config.copy_and_resolve_references().unlock()
        c.update_from_flattened_dict(values)
        return c.lock()

    assert frozen.missing(config) == []
    absent = changed(**{"weights.clip": str(tmp_path)})
    (problem,) = frozen.missing(absent)
    fetch = f'--include "text_encoder/*" "tokenizer/*" --local-dir {tmp_path}'
    assert "No clip weights" in problem and problem.endswith(fetch)
    vocab_size = len(files.clip_vocabulary())
    files.write_clip_weights(tmp_path / "text_encoder", files.CLIP_JSON)
    (problem,) = frozen.missing(absent)
    assert "No tokenizer" in problem and fetch in problem
    files.write_clip(tmp_path / "tokenizer")
    mesh = sharding.make_mesh()
    with pytest.raises(
        ConfigError, match=rf"has {vocab_size} tokens, more than clip.vocab_size = 40"
    ):
        frozen.load(changed(**{"clip.vocab_size": 40}), trained, mesh)
    with pytest.raises(ConfigError, match=rf"clip.vocab_size is {vocab_size}, vocab_size 40"):
        frozen.load(absent, trained, mesh)
