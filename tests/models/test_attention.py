"""`attend` against a softmax in NumPy, float64, head by head and query by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models.attention import attend

B, Q, S, N, K, H = 2, 3, 5, 4, 2, 6
SCALE = 0.37


def operands(kv_heads=K, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, Q, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def literal(q, k, v, seen, bound=lambda scores: scores):
    """`seen[b, i, s]`: whether query i of row b sees key s; `bound` is applied to the scores."""
    out = np.zeros(q.shape)
    q, k, v = (np.float64(x) for x in (q, k, v))
    for b, i, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        keys = np.flatnonzero(seen[b, i])
        scores = bound(np.array([SCALE * (q[b, i, n] @ k[b, s, head]) for s in keys]))
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ v[b, keys, head]
    return out


EVERYTHING = np.ones((B, Q, S), bool)
BY_KEY = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
BY_QUERY = np.array(
    [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]],
    ],
    bool,
)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "mask, seen",
    [
        (None, EVERYTHING),
        (BY_KEY, np.broadcast_to(BY_KEY[:, None], (B, Q, S))),
        (BY_QUERY, BY_QUERY),
    ],
    ids=["all", "by key", "by query and key"],
)
def test_attention_is_numpys(kv_heads, mask, seen):
    q, k, v = operands(kv_heads)
    np.testing.assert_allclose(
        attend(q, k, v, mask, scale=SCALE), literal(q, k, v, seen), rtol=0, atol=1e-6
    )


def test_scores_are_capped_before_the_mask():
    q, k, v = operands()
    q = 30 * q  # far beyond the cap

    def bound(scores):
        return 2.0 * np.tanh(scores / 2.0)

    seen = np.broadcast_to(BY_KEY[:, None], (B, Q, S))
    out = attend(q, k, v, BY_KEY, scale=SCALE, softcap=2.0)
    np.testing.assert_allclose(out, literal(q, k, v, seen, bound), rtol=0, atol=1e-5)
    assert np.abs(out - literal(q, k, v, seen)).max() > 0.1


def test_masked_keys_and_values_have_no_influence_at_all():
    q, k, v = operands()
    huge = np.where(BY_KEY[..., None, None], 0, 1e30).astype(np.float32)
    out = attend(q, k, v, BY_KEY, scale=SCALE)
    np.testing.assert_array_equal(attend(q, k + huge, v + huge, BY_KEY, scale=SCALE), out)
    grads = jax.grad(lambda k, v: attend(q, k, v, BY_KEY, scale=SCALE).sum(), (0, 1))(k, v)
    for grad in grads:
        assert not np.asarray(grad)[~BY_KEY].any()
    assert np.asarray(grads[1])[BY_KEY].all()


def test_a_query_that_sees_nothing_gets_the_mean_of_the_values():
    q, k, v = operands(kv_heads=4)
    out = attend(q, k, v, np.zeros((B, S), bool), scale=SCALE)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1)[:, None], out.shape), atol=1e-6)


def test_the_softmax_of_bfloat16_is_taken_in_float32():
    """Scores around 300 are 2 apart in bfloat16: there, neighbours could not be told apart."""
    q = jnp.full((1, 1, 1, 2), 17.0, jnp.bfloat16)
    k = jnp.array([[17.0, 1.0], [17.0, 1.0625]], jnp.bfloat16)[None, :, None]
    v = jnp.array([[1.0, 0.0], [0.0, 1.0]], jnp.bfloat16)[None, :, None]
    out = attend(q, k, v, scale=1.0)
    assert out.dtype == jnp.bfloat16
    second = 1 / (1 + np.exp(-17 * 0.0625))
    np.testing.assert_allclose(np.float32(out)[0, 0, 0], [1 - second, second], atol=4e-3)


def test_keys_and_values_must_agree():
    q, k, v = operands()
    with pytest.raises(AssertionError):
        attend(q, k, v[:, :-1], scale=SCALE)
    with pytest.raises(AssertionError):
        attend(q[0], k, v, scale=SCALE)
