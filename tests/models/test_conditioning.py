"""How the time enters, each way against NumPy in float64."""

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import conditioning
from tests import tiny

B, D, P = 2, 8, 5
RNG = np.random.default_rng(0)
E_BD, X_BID = RNG.standard_normal((B, D)).astype("f4"), RNG.standard_normal((B, 3, D)).astype("f4")
POOLED_BP = RNG.standard_normal((B, P)).astype("f4")
TIMESTEP_B = np.array([12.5, 999.0], np.float32)


def make(module, *inputs):
    """(output, parameters): all of these random."""
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f4"), meta.unbox(boxed))
    return jax.jit(module.apply)({"params": params}, *inputs), jax.tree.map(np.float64, params)


def silu(x):
    return x / (1 + np.exp(-np.float64(x)))


def linear(x, p):
    return np.tensordot(np.float64(x), p["weight"], 1) + p["bias"]


def mlp(x, p):
    return linear(silu(linear(x, p["hidden"])), p["out"])


def test_timestep_features_are_literal():
    features = np.asarray(conditioning.timestep_features(jnp.array([0.0, 370.0, 1000.0]), 8))
    for row, t in zip(features, (0.0, 370.0, 1000.0), strict=True):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=3e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_embedding_is_of_the_time_and_the_pooled_text(pooled):
    net = conditioning.TimeEmbedding(D, P if pooled else 0, 1e-6)
    e, p = make(net, TIMESTEP_B, POOLED_BP if pooled else None)
    expected = mlp(conditioning.timestep_features(TIMESTEP_B), p["time"])
    if pooled:
        h = POOLED_BP / np.sqrt((np.float64(POOLED_BP) ** 2).mean(-1, keepdims=True) + 1e-6)
        expected = expected + mlp(h * (1 + p["pooled_norm"]["weight"]), p["pooled"])
    tiny.close(e, expected)
    assert len(p) == (3 if pooled else 1)


@pytest.mark.parametrize("pooled, given", [(None, "none"), (POOLED_BP[:, :4], "one of 4")])
def test_a_pooled_embedding_that_is_not_there_is_asked_for(pooled, given):
    net = conditioning.TimeEmbedding(D, P, 1e-6)
    with pytest.raises(ValueError, match=f"of width 5, given was {given}: pass it to encode_text"):
        net.init(jax.random.key(0), TIMESTEP_B, pooled)


def test_adaln_zero_is_a_projection_in_every_block():
    how = conditioning.CONDITIONING["adaln-zero"]
    affines, p = make(how.block(), E_BD)
    six = linear(silu(E_BD), p["linear"])
    tiny.close(jnp.concatenate([*affines[0], *affines[1]], 1), six)
    assert affines[1].gate.shape == (B, 1, D) and how.shared is None and not how.added
    out, p = make(how.final(), X_BID, E_BD)
    scale, shift = np.split(linear(silu(E_BD), p["linear"]), 2, 1)
    tiny.close(out, X_BID * (1 + scale) + shift)


def test_adaln_single_is_one_projection_and_a_table_in_every_block():
    how = conditioning.CONDITIONING["adaln-single"]
    shared, p = make(how.shared(), E_BD)
    tiny.close(shared, linear(silu(E_BD), p["linear"]))
    affines, p = make(how.block(), shared)
    tiny.close(jnp.concatenate([*affines[0], *affines[1]], 1), shared + p["table"])
    out, p = make(how.final(), X_BID, E_BD)
    shift, scale = (E_BD + p["table"][i] for i in (0, 1))
    tiny.close(out, X_BID * (1 + scale[:, None]) + shift[:, None])


def test_they_start_as_published():
    """AdaLN-Zero at zero; tables at 1 / sqrt(D), the shared projection and embeddings at 0.02."""
    how, wide = conditioning.CONDITIONING, jnp.ones((1, 64))
    zero = how["adaln-zero"].block().init(jax.random.key(0), wide)["params"]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(zero))
    single = how["adaln-single"].shared().init(jax.random.key(0), wide)["params"]["linear"]
    assert np.std(single["weight"].unbox()) == pytest.approx(0.02, rel=0.05)
    table = how["adaln-single"].block().init(jax.random.key(0), jnp.ones((1, 6, 256)))["params"]
    assert np.std(table["table"].unbox()) == pytest.approx(1 / 16, rel=0.1)
    net = conditioning.TimeEmbedding(64, 32, 1e-6)
    params = meta.unbox(net.init(jax.random.key(0), jnp.ones(1), jnp.ones((1, 32)))["params"])
    for part in ("time", "pooled"):
        for layer in ("hidden", "out"):
            assert np.std(params[part][layer]["weight"]) == pytest.approx(0.02, rel=0.1)
            assert not params[part][layer]["bias"].any()
