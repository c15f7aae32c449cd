"""Next-token prediction: the loss against NumPy, and that it is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.training import pretrain
from tests import tiny


def test_the_loss_is_the_mean_cross_entropy_of_real_tokens_after_the_first():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((2, 4, 7)).astype(np.float32)
    ids = rng.integers(0, 7, (2, 4))
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    terms = []
    for b, i in ((0, 1), (0, 2), (1, 1)):
        row = np.float64(logits[b, i - 1])
        terms.append(np.log(np.exp(row).sum()) - row[ids[b, i]])
    actual = pretrain.next_token_loss(logits, ids, mask)
    assert actual == pytest.approx(np.mean(terms), rel=1e-6)
    alone = np.array([[1, 0, 0, 0]] * 2, bool)  # captions that were dropped: BOS and no more
    assert pretrain.next_token_loss(logits, ids, alone) == 0


def test_pretraining_learns_a_rule():
    """Every token is the one before it plus one, from a random start."""
    net, start = tiny.model(), jax.tree.map(lambda x: x / 4, tiny.params(tiny.model())["llm"])
    rng = np.random.default_rng(0)

    def batches():
        while True:
            ids = (rng.integers(0, 20, (8, 1)) + np.arange(6)) % 20
            yield {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.ones((8, 6), bool)}

    before = jax.tree.map(np.array, start)
    steps = pretrain.pretrain(net, start, batches(), steps=60, learning_rate=1e-2)
    trained = [(params, float(loss)) for params, loss in steps]
    losses, params = [loss for _, loss in trained], trained[-1][0]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(np.log(tiny.LLM["vocab_size"]), rel=0.2)
    assert losses[-1] < 1.5  # knowing only the alphabet is log(20) = 3.0
    assert jax.tree.structure(params) == jax.tree.structure(before)
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != b).mean(), params, before)
    assert min(jax.tree.leaves(moved)) > 0.3  # all is trained
