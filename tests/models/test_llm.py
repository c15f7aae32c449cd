"""The language model: who sees whom, and the loop over layers. (Its values: tests/interop.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import layers
from t2i_jax.models.llm import LLM, LLMBlock
from t2i_jax.models.positions import text_angles
from tests import tiny

NET = LLM(**tiny.LLM)
_, _, IDS, MASK = tiny.inputs()


@pytest.fixture(scope="module")
def params():
    return tiny.params(tiny.model())["llm"]


def read(params, ids=IDS, mask=MASK, net=NET):
    return jax.jit(net.apply)({"params": params}, ids, mask)


def test_a_token_is_influenced_by_itself_and_those_before_it_alone(params):
    """The derivative of position i along a change of the embedding of token j, for all i, j."""
    row, table = IDS[:1], params["embed"]["weight"]
    change = np.random.default_rng(3).standard_normal(table.shape).astype(np.float32)
    one_token = np.arange(len(table)) == row[0][:, None]  # all tokens differ: a row is a place

    def read_with(table):
        variables = {"params": {**params, "embed": {"weight": table}}}
        features = NET.apply(variables, row, jnp.ones_like(row, bool))
        return features.hidden_BTD[0], features.keys_LBTKH[-1, 0], features.values_LBTKH[-1, 0]

    def along(token):
        return jax.jvp(read_with, (table,), (change * token[:, None],))[1]

    for derivative in jax.jit(jax.vmap(along))(one_token):  # (j, i, ...)
        moved = np.asarray(derivative).reshape(tiny.TEXT, tiny.TEXT, -1).any(-1)
        np.testing.assert_array_equal(moved, np.triu(np.ones((tiny.TEXT,) * 2, bool)))


def test_padding_is_read_by_no_real_token(params):
    noise = np.where(MASK, IDS, np.random.default_rng(5).integers(0, 300, IDS.shape))
    assert (noise != IDS).any()
    features, other = read(params), read(params, noise)
    np.testing.assert_array_equal(features.hidden_BTD[MASK], other.hidden_BTD[MASK])
    np.testing.assert_array_equal(features.keys_LBTKH[:, MASK], other.keys_LBTKH[:, MASK])
    np.testing.assert_array_equal(features.values_LBTKH[:, MASK], other.values_LBTKH[:, MASK])
    np.testing.assert_array_equal(features.mask_BT, MASK)


def test_the_length_of_the_padding_changes_nothing(params):
    features = read(params)
    shorter = read(params, IDS[1:2, :3], MASK[1:2, :3])
    tiny.close(shorter.hidden_BTD, features.hidden_BTD[1:2, :3], 1e-5)
    tiny.close(shorter.keys_LBTKH, features.keys_LBTKH[:, 1:2, :3], 1e-5)


@pytest.mark.parametrize("unroll", [1, 3])
def test_layers_are_a_python_loop_over_their_parameters(params, unroll):
    """Features are the keys and values of each layer, and the last hidden state, normalised."""
    features = read(params, net=NET.clone(unroll=unroll))
    names = ("num_heads", "num_kv_heads", "head_width", "mlp_width", "norm_eps")
    block = LLMBlock(*(tiny.LLM[name] for name in names), jnp.float32)
    apply = jax.jit(block.apply)
    causal = np.tril(np.ones((tiny.TEXT,) * 2, bool)) & MASK[:, None]
    angles = text_angles(tiny.TEXT, tiny.LLM["head_width"], tiny.LLM["rope_theta"])
    x = params["embed"]["weight"][IDS] * 4.0  # sqrt(width)
    for i in range(tiny.LLM["num_layers"]):
        own = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        x, (k, v) = apply({"params": own}, x, causal, angles)
        tiny.close(features.keys_LBTKH[i], k, 1e-5)
        tiny.close(features.values_LBTKH[i], v, 1e-5)
    hidden = layers.RMSNorm(1e-6).apply({"params": params["final_norm"]}, x)
    tiny.close(features.hidden_BTD, hidden, 1e-5)


def test_logits_are_of_the_hidden_state_and_the_embedding(params):
    logits = NET.apply({"params": params}, IDS, MASK, method="logits")
    hidden = np.float64(read(params).hidden_BTD)
    assert logits.dtype == jnp.float32
    tiny.close(logits, hidden @ np.float64(params["embed"]["weight"]).T, 1e-5)


def test_ids_and_mask_must_agree(params):
    with pytest.raises(AssertionError):
        read(params, IDS, MASK[:, :-1])
    with pytest.raises(AssertionError):
        read(params, IDS[0], MASK[0])
