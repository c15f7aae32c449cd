"""The contrastive loss in closed form, and a small CLIP that tells scenes apart."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.data.scenes import Scenes
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.models.clip import CLIPText
from t2i_jax.training import contrastive

CLIP = {"vocab_size": 300, "width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32}
CLIP |= {"max_tokens": 24, "projection_width": 8, "activation": "quick_gelu", "eos_id": 0}
CLIP |= {"norm_eps": 1e-5}


def test_embeddings_that_say_nothing_cost_the_logarithm_of_the_batch():
    same = jnp.ones((5, 3))
    assert float(contrastive.loss(same, 2 * same, jnp.zeros(()))) == pytest.approx(np.log(5))


def test_by_hand():
    """Two texts and two pictures, at right angles to the others' partners; scale e."""
    text, image = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    e = np.e
    expected = -np.log(np.exp(e) / (np.exp(e) + 1))
    assert float(contrastive.loss(text, image, jnp.ones(()))) == pytest.approx(expected, rel=1e-6)
    mixed = -np.log(1 / (np.exp(e) + 1))
    assert float(contrastive.loss(text, image[::-1], jnp.ones(()))) == pytest.approx(
        mixed, rel=1e-6
    )


def test_the_scale_has_a_limit():
    x = jnp.eye(2)
    losses = [float(contrastive.loss(x, x, jnp.log(scale))) for scale in (100.0, 1e6)]
    assert losses[0] == losses[1]


def test_it_learns_which_picture_belongs_to_which_text(monkeypatch):
    monkeypatch.setattr(contrastive, "STEPS", 200)
    monkeypatch.setattr(contrastive, "BATCH", 16)
    world = Scenes(16, "train", length=64)
    tokenizer = Tokenizer.train([world.caption(i) for i in range(64)], 300)
    steps = list(contrastive.train_clip(CLIP, world, tokenizer, 16, seed=0))
    assert len(steps) == 200
    losses = [loss for _, loss in steps]
    # Better than embeddings that say nothing.
    assert np.mean(losses[-10:]) < np.log(16) - 0.15 < np.mean(losses[:5])
    # What is kept is a text encoder of the config's section.
    ids, _ = tokenizer.encode(["a red ring", "a red ring on a brown background"], 24)
    found = CLIPText(**CLIP).apply({"params": steps[-1][0]}, ids)
    assert found.shape == (2, 8) and not np.allclose(found[0], found[1])
    again = itertools.islice(contrastive.train_clip(CLIP, world, tokenizer, 16, seed=0), 5)
    assert [loss for _, loss in again] == losses[:5]
