"""What each source makes of the LLM's features, and how memories are put together."""

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import memory
from tests import tiny

M, B, T, K, H, E, D = 4, 2, 3, 1, 2, 5, 8
THETA = 100.0
MASK = np.array([[True, True, True], [True, False, False]])


def features(seed=0):
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, M, B, T, K, H)).astype(np.float32)
    hidden = rng.standard_normal((B, T, E)).astype(np.float32)
    return memory.TextFeatures(keys, values, hidden, MASK)


def source(name, layers, rope_theta=THETA, **fields):
    return memory.SOURCES[name](layers, D, rope_theta, 1e-6, **fields)


def remember(net, given=None, params=None):
    return jax.jit(net.apply)({"params": params or {}}, given or features())


def turned(keys):
    """(..., T, 1, 2): a head of two numbers is one complex one, turned by its position."""
    turn = np.exp(1j * np.arange(T))[:, None]
    out = (keys[..., 0] + 1j * keys[..., 1]) * turn
    return np.stack([out.real, out.imag], -1)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_deep_shares_the_last_layers(layers):
    given = features()
    made = remember(source("deep", layers))
    for i in range(layers):
        tiny.close(made.keys_LBTKH[i], turned(given.keys_LBTKH[M - layers + i]))
        np.testing.assert_array_equal(made.values_LBTKH[i], given.values_LBTKH[M - layers + i])
    assert len(made.keys_LBTKH) == len(made.values_LBTKH) == len(made.seen_L) == layers
    np.testing.assert_array_equal(made.mask_BT, MASK)
    np.testing.assert_array_equal(made.start_B, [3, 1])
    assert made.seen_L.all() and made.pooled_BP is None


def test_keys_for_cross_attention_carry_no_positions():
    made = remember(source("deep", 4, rope_theta=None))
    np.testing.assert_array_equal(made.keys_LBTKH, features().keys_LBTKH)
    np.testing.assert_array_equal(made.start_B, [0, 0])


def test_middle_shares_the_layers_of_the_same_number():
    given, made = features(), remember(source("middle", 6, first_layer=1))
    np.testing.assert_array_equal(made.seen_L, [False, True, True, True, False, False])
    for i in (1, 2, 3):
        tiny.close(made.keys_LBTKH[i], turned(given.keys_LBTKH[i]))
        np.testing.assert_array_equal(made.values_LBTKH[i], given.values_LBTKH[i])
    assert not np.asarray(made.keys_LBTKH)[[0, 4, 5]].any()
    np.testing.assert_array_equal(made.start_B, [3, 1])


def test_a_mixture_starts_as_the_deep_one_and_is_a_sum_over_layers():
    net, given = source("mixture", 3), features()
    boxed = net.init(jax.random.key(0), given)["params"]
    tiny.close(remember(net, given, meta.unbox(boxed)), remember(source("deep", 3)))
    weight = np.random.default_rng(1).standard_normal((3, M)).astype(np.float32)
    made = remember(net, given, {"weight": weight})
    for i in range(3):
        keys = sum(weight[i, m] * turned(given.keys_LBTKH[m]) for m in range(M))
        tiny.close(made.keys_LBTKH[i], keys)
        values = sum(weight[i, m] * given.values_LBTKH[m] for m in range(M))
        tiny.close(made.values_LBTKH[i], values)


def test_a_mixture_in_bfloat16_keeps_its_weights_in_float32():
    net, given = source("mixture", 3, dtype=jnp.bfloat16), features()
    start = np.eye(3, M, k=1, dtype=np.float32)
    moved = start - 1e-3 * np.eye(3, M, k=1, dtype=np.float32)  # bfloat16 has no such number
    before, after = (remember(net, given, {"weight": w}).values_LBTKH for w in (start, moved))
    assert before.dtype == jnp.bfloat16
    assert (np.asarray(before) != np.asarray(after)).mean() > 0.1


def test_shallow_starts_as_published():
    """The context layer normal, 0.02; projections xavier, each layer its own."""
    wide = memory.Shallow(3, 48, None, 1e-6)
    hidden = np.zeros((1, 1, 40), np.float32)
    keys = np.zeros((1, 1, 1, 2, 16), np.float32)
    given = memory.TextFeatures(keys, keys, hidden, np.ones((1, 1), bool))
    params = meta.unbox(wide.init(jax.random.key(0), given)["params"])
    assert np.std(params["context"]["weight"]) == pytest.approx(0.02, rel=0.05)
    assert not params["context"]["bias"].any() and not params["norm"]["weight"].any()
    bound = np.sqrt(6 / (48 + 32))
    for name in ("k", "v"):
        weight = np.asarray(params["layers"][name]["weight"])
        assert 0.97 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert abs(np.corrcoef(weight.reshape(3, -1)) - np.eye(3)).max() < 0.1
    assert not np.array_equal(params["layers"]["k"]["weight"], params["layers"]["v"]["weight"])


def test_shallow_projects_the_last_hidden_state_layer_by_layer():
    net, given = source("shallow", 3), features()
    boxed = jax.eval_shape(net.init, jax.random.key(0), given)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), meta.unbox(boxed)
    )
    made = remember(net, given, params)
    h = given.hidden_BTD / np.sqrt((given.hidden_BTD**2).mean(-1, keepdims=True) + 1e-6)
    h = h * (1 + params["norm"]["weight"])
    h = h @ params["context"]["weight"] + params["context"]["bias"]
    for name, actual in (("k", made.keys_LBTKH), ("v", made.values_LBTKH)):
        weight = params["layers"][name]["weight"]
        assert weight.shape == (3, D, K, H)
        for i in range(3):
            tiny.close(actual[i], np.einsum("BTD,DKH->BTKH", h, weight[i]))
    np.testing.assert_array_equal(made.start_B, [0, 0])
    assert boxed["layers"]["k"]["weight"].names == ("layers", "embed", "kv_heads", "head")


@pytest.mark.parametrize(
    "name, layers, first, message",
    [
        ("deep", 5, 0, r"5 layers.*4 layers.*dit\.num_layers"),
        ("mixture", 5, 0, r"5 layers.*4 layers.*dit\.num_layers"),
        ("middle", 3, 1, r"Layers 1 to 3 .*DiT of 3"),
        ("middle", 6, 4, r"Layers 4 to 3 .*memory\.first_layer < llm\.num_layers"),
    ],
)
def test_layers_that_are_not_there_are_refused(name, layers, first, message):
    net = source(name, layers, first_layer=first)
    with pytest.raises(ValueError, match=message):
        net.init(jax.random.key(0), features())


def test_unknown_sources_are_refused():
    with pytest.raises(ValueError, match=r"'wide'.*deep.*shallow.*middle.*mixture"):
        memory.find_source("wide")


def test_interleave_and_repeat_are_along_the_batch():
    made = remember(source("middle", 5, first_layer=2))
    made = made.replace(pooled_BP=jnp.arange(6.0).reshape(B, 3))
    other = jax.tree.map(lambda x: x if x.dtype == bool else x + 1, made)
    joined = memory.interleave(made, other)
    batch = {"keys_LBTKH": 1, "values_LBTKH": 1, "mask_BT": 0, "start_B": 0, "pooled_BP": 0}
    for name, axis in batch.items():
        both, one, two = (np.asarray(getattr(m, name)) for m in (joined, made, other))
        np.testing.assert_array_equal(both.take(range(0, 2 * B, 2), axis), one)
        np.testing.assert_array_equal(both.take(range(1, 2 * B, 2), axis), two)
        only = memory.repeat(jax.tree.map(lambda x: x, made), 1)
        np.testing.assert_array_equal(getattr(only, name), one)
    np.testing.assert_array_equal(joined.seen_L, made.seen_L)
    three = memory.repeat(made, 3)
    np.testing.assert_array_equal(three.start_B, [3, 3, 3, 1, 1, 1])
    assert three.keys_LBTKH.shape == (5, 6, T, K, H)
    plain = memory.interleave(made.replace(pooled_BP=None), made.replace(pooled_BP=None))
    assert plain.pooled_BP is None
