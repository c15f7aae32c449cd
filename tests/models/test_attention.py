"""`attend` against a softmax in NumPy, float64, head by head and query by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import sharding
from t2i_jax.models import attention_gpu, attention_tpu
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, BY_KEY], ids=["all", "by key"])
def test_attention_is_numpys(kv_heads, mask):
    q, k, v = operands(kv_heads)
    seen = EVERYTHING if mask is None else np.broadcast_to(mask[:, None], (B, Q, S))
    np.testing.assert_allclose(
        attend(q, k, v, mask, scale=SCALE), literal(q, k, v, seen), rtol=0, atol=1e-6
    )


def test_a_causal_query_sees_keys_up_to_its_own():
    _, k, v = operands()
    q = np.random.default_rng(1).standard_normal((B, S, N, H)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    past = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool
    )
    for seen, by_key in ((past & mask[:, None], mask), (np.stack([past] * B), None)):
        out = attend(q, k, v, by_key, scale=SCALE, causal=True)
        np.testing.assert_allclose(out, literal(q, k, v, seen), rtol=0, atol=1e-6)
    with pytest.raises(AssertionError):
        attend(q[:, :3], k, v, scale=SCALE, causal=True)


KERNEL_MASKS = {
    "all": lambda rng, queries, keys: (None, False),
    "padding": lambda rng, queries, keys: (np.arange(keys) < np.array([[keys - 70], [9]]), False),
    "anywhere": lambda rng, queries, keys: (rng.random((2, keys)) < 0.6, False),
    "causal": lambda rng, queries, keys: (np.arange(keys) < np.array([[keys], [30]]), True),
}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("masks", KERNEL_MASKS)
def test_the_tpu_kernel_is_the_same_attention_gradients_included(masks, heads, kv_heads, softcap):
    """Interpreted, at lengths and widths that are padded: in float32 equal to 2e-5."""
    rng = np.random.default_rng(2)
    queries, keys, width = (200, 200, 72) if masks == "causal" else (130, 200, 72)
    mask, causal = KERNEL_MASKS[masks](rng, queries, keys)
    shapes = ((2, queries, heads, width), *[(2, keys, kv_heads, width)] * 2)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    weight = rng.standard_normal((2, queries, heads, width)).astype(np.float32)

    def run(kernel):
        def f(q, k, v):
            options = {"scale": 0.2, "causal": causal, "softcap": softcap, "kernel": kernel}
            out = attend(q, k, v, mask, **options)
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    for one, other in zip(run("splash"), run("xla"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (4, 4), (3, 1)])
def test_the_tpu_kernel_runs_on_any_mesh(sizes, heads, kv_heads):
    rng = np.random.default_rng(3)
    shapes = ((8, 128, heads, 128), *[(8, 256, kv_heads, 128)] * 2)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    mask = np.arange(256) < rng.integers(1, 257, (8, 1))
    weight = rng.standard_normal(q.shape).astype(np.float32)

    def run(kernel):
        def f(q, k, v):
            out = attend(q, k, v, mask, scale=0.1, kernel=kernel)
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    wanted = run("xla")
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        got = run("splash")
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("masks", KERNEL_MASKS)
def test_the_tpu_kernel_in_bfloat16(masks):
    """Beside float32 of the same numbers: within two steps of bfloat16 of the largest, 2^-7."""
    rng = np.random.default_rng(4)
    mask, causal = KERNEL_MASKS[masks](rng, 256, 256)
    shapes = ((2, 256, 4, 128), *[(2, 256, 1, 128)] * 2)
    whole = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]
    weight = rng.standard_normal(shapes[0]).astype(np.float32)

    def run(kernel, dtype):
        def f(q, k, v):
            out = attend(q, k, v, mask, scale=0.1, causal=causal, kernel=kernel)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        given = [x.astype(dtype) for x in whole]
        (_, out), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*given)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    exact = run("xla", jnp.float32)
    for one, other in zip(run("splash", jnp.bfloat16), exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-7 * np.abs(other).max())


def test_kernels_suit_shapes_and_devices():
    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    image, text = like(4, 1024, 8, 256), like(4, 1280, 1, 256)
    assert attention_tpu.suits(image, text)
    assert not attention_tpu.suits(like(4, 36, 4, 64), like(4, 60, 1, 64))
    assert not attention_tpu.suits(like(4, 1024, 8, 16), like(4, 1280, 1, 16))
    for kind, head_bytes, wanted in (
        ("TPU v4", 512, (512, 640)),
        ("TPU v5 lite", 512, (512, 1280)),
        ("TPU v5", 512, (1024, 1280)),
        ("TPU v5", 1024, (512, 1280)),
    ):
        blocks = attention_tpu.block_sizes(1024, 1280, head_bytes, kind)
        assert (blocks.block_q, blocks.block_kv) == wanted
        assert 1024 % blocks.block_q == 1280 % blocks.block_kv == 0
        assert 1024 % blocks.block_q_dkv == 1280 % blocks.block_kv_dkv == 0
    assert attention_gpu.suits(like(4, 1024, 8, 128), 0.0)
    for wrong in (like(4, 8, 8, 128, dtype=jnp.float32), like(4, 8, 8, 260), like(4, 8, 8, 256)):
        assert not attention_gpu.suits(wrong, 0.0)  # the last one on Hopper alone
    assert not attention_gpu.suits(like(4, 1024, 8, 128), 50.0)
    q, k, v = operands()
    with pytest.raises(ValueError, match="Unknown attention kernel 'flash'; known: "):
        attend(q, k, v, scale=SCALE, kernel="flash")


def test_seen_keys_come_first_in_their_order():
    k = np.arange(10).reshape(2, 5, 1, 1)
    (first,) = attention_gpu.seen_first(jnp.asarray(BY_KEY), k)
    assert np.asarray(first)[..., 0, 0].tolist() == [[0, 1, 3, 2, 4], [9, 5, 6, 7, 8]]


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


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_a_query_that_sees_nothing_gets_finite_numbers(kernel):
    q, k, v = operands()

    def f(q, k, v):
        return attend(q, k, v, np.zeros((B, S), bool), scale=SCALE, kernel=kernel).sum()

    assert all(np.isfinite(x).all() for x in jax.grad(f, (0, 1, 2))(q, k, v))


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
