"""CLIP's text encoder: which token is pooled, and what it has seen. (Its values: tests/interop.)"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2i_jax import sharding
from t2i_jax.models.clip import CLIPText, LayerNorm

SIZES = {"vocab_size": 50, "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 24}
SIZES |= {"max_tokens": 8, "projection_width": 6}
IDS = np.array([[47, 5, 9, 48, 48, 48], [47, 2, 5, 3, 48, 48], [47, 30, 49, 48, 7, 1]])


@pytest.fixture(scope="module")
def params():
    boxed = jax.eval_shape(CLIPText(**SIZES).init, jax.random.key(0), IDS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.5 * rng.standard_normal(x.shape).astype("f4"), nn.meta.unbox(boxed)
    )


def pool(params, ids, **changes):
    return np.asarray(jax.jit(CLIPText(**SIZES | changes).apply)({"params": params}, ids))


@pytest.mark.parametrize(
    "eos_id, ends",
    [
        (48, [3, 4, 3]),  # the first one equal to it
        (2, [3, 4, 2]),  # the first one of the largest id, whatever 2 itself is
        (9, [2, 0, 0]),  # the first token where there is none
    ],
)
def test_the_first_end_of_text_is_pooled_and_nothing_after_it_is_seen(params, eos_id, ends):
    pooled = pool(params, IDS, eos_id=eos_id)
    assert pooled.shape == (3, 6) and pooled.dtype == np.float32
    # Under a causal mask, the row cut off behind its end says the same.
    alone = [
        pool(params, IDS[i : i + 1, : end + 1], eos_id=eos_id)[0] for i, end in enumerate(ends)
    ]
    np.testing.assert_allclose(pooled, alone, rtol=1e-5, atol=1e-5)
    for row, end in enumerate(ends):
        if end:
            other = IDS[row : row + 1].copy()
            other[0, end - 1] = 11
            assert np.abs(pool(params, other, eos_id=eos_id) - pooled[row]).max() > 1e-3


def test_order_matters(params):
    swapped = IDS[:1, [0, 2, 1, 3, 4, 5]]
    assert np.abs(pool(params, swapped) - pool(params, IDS[:1])).max() > 1e-3


def test_layer_norm():
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 16)).astype("f4")
    variables = {"params": {"weight": jnp.full(16, 2.0), "bias": jnp.full(16, 5.0)}}
    y = LayerNorm(1e-5).apply(variables, x)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, 2 * expected + 5, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_published_network():
    """As transformers counts CLIPTextModelWithProjection of SD3's config.json."""
    boxed = jax.eval_shape(CLIPText().init, jax.random.key(0), IDS)["params"]
    assert sum(x.size for x in jax.tree.leaves(boxed)) == 123_650_304
    shardings = sharding.param_shardings(boxed, sharding.make_mesh(1, 4, 2))
    assert shardings["blocks"]["q"]["weight"].spec == P(None, "fsdp", "tensor", None)
    assert shardings["blocks"]["mlp_down"]["weight"].spec == P(None, "tensor", "fsdp")


def test_what_it_cannot_read_is_refused(params):
    with pytest.raises(ValueError, match="9 tokens, but CLIP has 8 positions"):
        pool(params, np.zeros((1, 9), int))
    with pytest.raises(AssertionError):
        pool(params, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"'relu'; known: \['quick_gelu', 'gelu'\]"):
        pool(params, IDS, activation="relu")
    with pytest.raises(ValueError, match="width 16 must be a multiple of 3"):
        pool(params, IDS, num_heads=3)
