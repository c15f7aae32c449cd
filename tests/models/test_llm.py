"""The language model: who sees whom, the loop over layers, and every field's values in NumPy."""

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import layers
from t2i_jax.models.llm import LLM, LLMBlock, from_config
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
    angles = text_angles(tiny.TEXT, tiny.LLM["head_width"], tiny.LLM["rope_theta"])
    x = params["embed"]["weight"][IDS] * 4.0  # sqrt(width)
    for i in range(tiny.LLM["num_layers"]):
        own = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        x, (k, v) = apply({"params": own}, x, MASK, angles)
        tiny.close(features.keys_LBTKH[i], k, 1e-5)
        tiny.close(features.values_LBTKH[i], v, 1e-5)
    hidden = layers.RMSNorm(1e-6).apply({"params": params["final_norm"]}, x)
    tiny.close(features.hidden_BTD, hidden, 1e-5)


def test_logits_are_of_the_hidden_state_and_the_embedding(params):
    logits = NET.apply({"params": params}, IDS, MASK, method="logits")
    hidden = np.float64(read(params).hidden_BTD)
    assert logits.dtype == jnp.float32
    tiny.close(logits, hidden @ np.float64(params["embed"]["weight"]).T, 1e-5)


GEMMA_2 = {"post_norms": True, "query_scalar": 3.0, "softcap": 1.5, "logit_softcap": 2.0}
QWEN_3 = {"activation": "silu", "norm_offset": 0.0, "scale_embedding": False, "qk_norm": True}
FIELDS = [
    *({name: value} for name, value in (GEMMA_2 | QWEN_3).items()),
    GEMMA_2,
    QWEN_3,
    *(GEMMA_2 | {"num_plain": count} for count in (1, 2, 3)),
]


def literal(p, net, ids):
    """(keys (L, T, K, H), values, hidden (T, D), logits) of one prompt, float64."""
    T, H, N, K = len(ids), net.head_width, net.num_heads, net.num_kv_heads

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (net.norm_offset + weight)

    def turn(x):
        angle = np.arange(T)[:, None, None] * net.rope_theta ** (-np.arange(H // 2) / (H // 2))
        pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def cap(x, bound):
        return bound * np.tanh(x / bound) if bound else x

    x = p["embed"]["weight"][ids] * (net.width**0.5 if net.scale_embedding else 1)
    keys, values = [], []
    for i in range(net.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        plain = i >= net.num_layers - net.num_plain
        h = norm(x, w["attention_norm"]["weight"])
        q, k, v = (np.einsum("td,dnh->tnh", h, w["attention"][n]["weight"]) for n in "qkv")
        if net.qk_norm:
            q, k = norm(q, w["q_norm"]["weight"]), norm(k, w["k_norm"]["weight"])
        keys.append(k), values.append(v)
        scale = (H if plain or not net.query_scalar else net.query_scalar) ** -0.5
        k, v = (np.repeat(a, N // K, axis=1) for a in (turn(k), v))
        scores = cap(scale * np.einsum("tnh,snh->nts", turn(q), k), 0 if plain else net.softcap)
        weights = np.exp(scores) * np.tril(np.ones((T, T)))
        h = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        h = np.einsum("tnh,nhd->td", h, w["attention_out"]["weight"])
        x = x + (norm(h, w["attention_post_norm"]["weight"]) if net.post_norms else h)
        h = norm(x, w["mlp_norm"]["weight"])
        gate, up = (h @ w["mlp"][n]["weight"] for n in ("gate", "up"))
        gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        act = gelu if net.activation == "gelu" else gate / (1 + np.exp(-gate))
        h = (act * up) @ w["mlp"]["down"]["weight"]
        x = x + (norm(h, w["mlp_post_norm"]["weight"]) if net.post_norms else h)
    hidden = norm(x, p["final_norm"]["weight"])
    return (
        np.stack(keys),
        np.stack(values),
        hidden,
        cap(hidden @ p["embed"]["weight"].T, net.logit_softcap),
    )


def random(net, seed=0):
    """Parameters of which all are random; scores that a cap of 1.5 bends."""
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(net.init, jax.random.key(0), IDS, MASK)["params"]
    return jax.tree.map(
        lambda x: (0.35 * rng.standard_normal(x.shape)).astype(np.float32), meta.unbox(boxed)
    )


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields))
def test_every_field_is_numpys_and_makes_a_difference(fields):
    net = LLM(**tiny.LLM, **fields)
    params = random(net)
    both = jax.jit(lambda p: [net.apply(p, IDS, MASK, method=m) for m in ("__call__", "logits")])
    features, logits = both({"params": params})
    exact = jax.tree.map(np.float64, params)
    *_, last = fields
    without = net.clone(**{last: getattr(NET, last)})
    for row, length in enumerate(tiny.LENGTHS[:2]):
        ids = IDS[row, :length]
        keys, values, hidden, expected = literal(exact, net, ids)
        tiny.close(features.keys_LBTKH[:, row, :length], keys, 1e-5)
        tiny.close(features.values_LBTKH[:, row, :length], values, 1e-5)
        tiny.close(features.hidden_BTD[row, :length], hidden, 1e-5)
        tiny.close(logits[row, :length], expected, 1e-5)
        assert np.abs(literal(exact, without, ids)[-1] - expected).max() > 1e-2


def graph(**fields):
    net = LLM(**tiny.LLM, **fields)
    return str(jax.make_jaxpr(net.apply)({"params": random(net)}, IDS, MASK))


def test_plain_layers_cost_nothing_where_all_are_alike():
    assert graph(num_plain=2) == graph()
    assert graph(num_plain=2, query_scalar=8.0) == graph()  # the head's width
    assert graph(num_plain=3, softcap=5.0, query_scalar=2.0) == graph()
    assert "cond" not in graph(softcap=5.0)
    assert "cond" in graph(softcap=5.0, num_plain=2)


def test_shared_layers_are_plain_unless_the_config_says_otherwise():
    section = tiny.LLM | {"softcap": 5.0}
    assert from_config(section, 2) == LLM(**section, num_plain=2)
    assert from_config(section | {"softcap_shared": True}, 2) == LLM(**section)
    assert from_config(section | {"softcap_shared": False}) == LLM(**section)
    assert tiny.model(llm={"softcap": 5.0}).llm.num_plain == tiny.DIT["num_layers"]


def test_a_text_beyond_the_limit_is_refused(params):
    assert read(params, net=NET.clone(max_tokens=tiny.TEXT)) is not None
    with pytest.raises(ValueError, match=r"5 tokens is longer than llm.max_tokens = 4"):
        read(params, net=NET.clone(max_tokens=tiny.TEXT - 1))


def test_ids_and_mask_must_agree(params):
    with pytest.raises(AssertionError):
        read(params, IDS, MASK[:, :-1])
    with pytest.raises(AssertionError):
        read(params, IDS[0], MASK[0])
