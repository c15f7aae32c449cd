"""The diffusion transformer: its patches, its conditioning, and the loop over its layers."""

import functools

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import dit, layers, positions
from t2i_jax.models.memory import TextMemory
from tests import tiny

Z, T_B, _, MASK = tiny.inputs()
HEADS = ("num_heads", "num_kv_heads", "head_width")
SHAPE = (3, tiny.TEXT, tiny.LLM["num_kv_heads"], tiny.LLM["head_width"])


def make(num_layers=2, **fields):
    shared = {name: tiny.LLM[name] for name in (*HEADS, "rope_theta", "norm_eps")}
    return dit.DiT(
        **shared, **{**tiny.DIT, "num_layers": num_layers, **fields}, channels=tiny.LATENTS[-1]
    )


def memory(num_layers=2, seed=0):
    rng = np.random.default_rng((seed, 2))
    keys, values = rng.standard_normal((2, num_layers, *SHAPE)).astype(np.float32)
    return TextMemory(keys, values, MASK)


def random_params(net, seed=0):
    boxed = jax.eval_shape(net.init, jax.random.key(0), Z, T_B, memory(net.num_layers))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.25 * rng.standard_normal(x.shape), jnp.float32), meta.unbox(boxed)
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(net, params, t=T_B):
    return net.apply({"params": params}, Z, t, memory(net.num_layers))


def test_patches_are_literal():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = dit.patchify(x, 2)
    assert patches.shape == (2, 6, 2, 2, 3)
    for b, r, c, p, q in np.ndindex(2, 2, 3, 2, 2):
        np.testing.assert_array_equal(patches[b, 3 * r + c, p, q], x[b, 2 * r + p, 2 * c + q])
    np.testing.assert_array_equal(dit.unpatchify(patches, (2, 3)), x)


def test_timestep_features_are_literal():
    features = np.asarray(dit.timestep_features(jnp.array([0.0, 0.37, 1.0]), 8))
    for row, t in zip(features, (0.0, 370.0, 1000.0), strict=True):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=3e-5)


def literal(net, params, text):
    """The network as its docstrings have it: a Python loop over blocks."""
    modulated = net.conditioning == "adaln-zero"
    silu = jax.nn.silu
    x = jnp.einsum("BIpqC,pqCD->BID", dit.patchify(Z, 2), params["patch_embed"]["weight"])
    x += params["patch_embed"]["bias"]
    if modulated:
        hidden, out = params["time_embed"]["hidden"], params["time_embed"]["out"]
        time = silu(dit.timestep_features(T_B) @ hidden["weight"] + hidden["bias"])
        time = time @ out["weight"] + out["bias"]
    angles = positions.image_angles(
        net.positions, (2, 3), MASK.sum(-1), net.head_width, net.rope_theta
    )
    block = dit.DiTBlock(
        *(getattr(net, name) for name in HEADS),
        net.mlp_width,
        *(net.conditioning, net.qk_norm, net.sandwich_norm, net.norm_eps, jnp.float32),
    )
    for i in range(net.num_layers):
        own = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        layer = (text.keys_LBTKH[i], text.values_LBTKH[i])
        x, _ = block.apply({"params": own}, x, layer, time if modulated else None, MASK, angles)
    x = layers.RMSNorm(net.norm_eps).apply({"params": params["final_norm"]}, x)
    if modulated:
        linear = params["final_modulation"]["linear"]
        both = jnp.einsum("BE,EMD->BMD", silu(time), linear["weight"]) + linear["bias"]
        x = x * (1 + both[:, :1]) + both[:, 1:]  # (scale, shift), as the published one
    x = jnp.einsum("BID,DpqC->BIpqC", x, params["out"]["weight"]) + params["out"]["bias"]
    return dit.unpatchify(x, (2, 3))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 3, "unroll": 3},
        {"num_layers": 3, "conditioning": "none", "sandwich_norm": True, "positions": "m-rope"},
        {"qk_norm": False, "positions": "1d-rope"},
    ],
    ids=["unrolled", "none, sandwich", "no qk-norm"],
)
def test_the_network_is_a_python_loop_over_its_layers(fields):
    net = make(**fields)
    params, text = random_params(net), memory(net.num_layers)
    tiny.close(apply(net, params), jax.jit(lambda: literal(net, params, text))())
    if net.unroll > 1:
        tiny.close(apply(net, params), apply(net.clone(unroll=1), params))


def block_step(conditioning="adaln-zero", **fields):
    """(block, its parameters, inputs) for tests of one block."""
    net = make(num_layers=1, conditioning=conditioning, **fields)
    own = jax.tree.map(lambda p: p[0], random_params(net)["blocks"])
    x = np.random.default_rng(1).standard_normal((3, 6, net.width)).astype(np.float32)
    time = np.random.default_rng(2).standard_normal((3, net.width)).astype(np.float32)
    return own, x, time


def literal_block(own, x, time, text, angles, sandwich):
    """One block in einsums: modulate(norm(x)) -> attention -> gate, then the same with the MLP."""

    def norm(name, h):
        h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
        return h * (1 + own[name]["weight"])

    def project(name, h):
        return jnp.einsum("BSD,DNH->BSNH", h, own["attention"][name]["weight"])

    linear = own["modulation"]["linear"]
    parts = jnp.einsum("BE,EMD->MBD", jax.nn.silu(time), linear["weight"])
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (parts + linear["bias"][:, None])[
        :, :, None
    ]
    after = (lambda name, h: norm(name, h)) if sandwich else (lambda name, h: h)
    h = norm("attention_norm", x) * (1 + scale_a) + shift_a
    q, k, v = (project(name, h) for name in "qkv")
    q, k = (positions.rotate(norm(f"{n}_norm", y), angles) for n, y in (("q", q), ("k", k)))
    k, v = jnp.concatenate([text[0], k], 1), jnp.concatenate([text[1], v], 1)
    k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))  # 4 query heads, 2 of keys
    seen = jnp.concatenate([MASK, jnp.ones((3, 6), bool)], 1)
    scores = jnp.einsum("BINH,BSNH->BNIS", q, k) / jnp.sqrt(8.0)
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None])
    h = jnp.einsum("BNIS,BSNH->BINH", weights, v)
    h = jnp.einsum("BINH,NHD->BID", h, own["attention_out"]["weight"])
    x = x + gate_a * after("attention_post_norm", h)
    h = norm("mlp_norm", x) * (1 + scale_m) + shift_m
    mlp = {name: own["mlp"][name]["weight"] for name in ("gate", "up", "down")}
    h = (jax.nn.gelu(h @ mlp["gate"], approximate=True) * (h @ mlp["up"])) @ mlp["down"]
    return x + gate_m * after("mlp_post_norm", h)


@pytest.mark.parametrize("sandwich", [False, True])
def test_a_block_is_its_einsums(sandwich):
    own, x, time = block_step(sandwich_norm=sandwich)
    text = tuple(part[0] for part in (memory(1).keys_LBTKH, memory(1).values_LBTKH))
    angles = positions.image_angles("2d-rope", (2, 3), MASK.sum(-1), 8, 100.0)
    block = dit.DiTBlock(4, 2, 8, 32, "adaln-zero", True, sandwich, 1e-6, jnp.float32)
    actual, _ = jax.jit(block.apply)({"params": own}, x, text, time, MASK, angles)
    expected = jax.jit(literal_block, static_argnums=5)(own, x, time, text, angles, sandwich)
    tiny.close(actual, expected)


def test_variants_have_their_parameters_and_no_others():
    def paths(**fields):
        return set(flatten_dict(random_params(make(**fields)), sep="/"))

    full = paths()
    timed = {p for p in full if "time_embed" in p or "modulation" in p}
    assert len(timed) == 8
    assert full - paths(conditioning="none") == timed
    assert full - paths(qk_norm=False) == {"blocks/q_norm/weight", "blocks/k_norm/weight"}
    posts = {"blocks/attention_post_norm/weight", "blocks/mlp_post_norm/weight"}
    assert paths(sandwich_norm=True) - full == posts


def test_without_conditioning_the_time_is_not_seen():
    for conditioning, seen in (("none", False), ("adaln-zero", True)):
        net = make(conditioning=conditioning)
        params = random_params(net)
        moved = np.abs(apply(net, params) - apply(net, params, t=T_B / 2)).max()
        assert (moved > 1e-3) == seen and (seen or moved == 0)


def test_a_prediction_of_the_data_gives_the_velocity_that_leads_there():
    net = make(prediction="data")
    params = random_params(net)
    times = np.array([0.001, 0.05, 0.8], np.float32)
    output = apply(make(), params, times)  # the same network, its output as it is
    slope = (Z - np.asarray(output)) / np.array([0.05, 0.05, 0.8])[:, None, None, None]
    tiny.close(apply(net, params, times), slope)


def test_remat_changes_what_is_recomputed_and_nothing_else():
    net = make()
    params = random_params(net)

    def gradient(policy):
        def loss(p):
            return jnp.square(net.clone(remat=policy).apply({"params": p}, Z, T_B, memory())).mean()

        traced = jax.jit(jax.grad(loss)).trace(params)
        return str(traced.jaxpr).count("dot_general"), traced.lower().compile()(params)

    products, grads = gradient("none")
    for policy in ("full", "dots"):
        more, same = gradient(policy)
        tiny.close(same, grads)
        # 'dots' keeps the outputs of weights: only attention's two products are done again.
        assert (more >= products + 7) if policy == "full" else (more == products + 2)


def test_at_first_the_velocity_is_zero_and_blocks_are_the_identity():
    net = make(num_layers=3)
    params = meta.unbox(jax.jit(net.init)(jax.random.key(0), Z, T_B, memory(3))["params"])
    assert not apply(net, params).any()
    flat = flatten_dict(params, sep="/")
    zero = {p for p, x in flat.items() if not np.asarray(x).any()}
    norms_and_biases = {p for p in flat if p.endswith("bias") or "norm/" in p}
    zeros = {f"{p}/linear/weight" for p in ("blocks/modulation", "final_modulation")}
    assert zero == norms_and_biases | zeros | {"out/weight"}
    bounds = {"q": (24, 32), "k": (24, 16), "v": (24, 16)}
    for name, (fan_in, fan_out) in bounds.items():
        weight = np.asarray(flat[f"blocks/attention/{name}/weight"])
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert 0.97 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert abs(np.corrcoef(weight.reshape(3, -1)) - np.eye(3)).max() < 0.2  # each layer its own


@pytest.mark.parametrize(
    "z, message",
    [
        (Z[:, :3], r"\(3, 3, 6, 3\).*patch size 2.*channels must be 3"),
        (Z[:, :, :5], r"multiples of the patch size 2"),
        (Z[..., :2], r"channels must be 3"),
    ],
)
def test_latents_of_another_shape_are_refused(z, message):
    net = make()
    with pytest.raises(ValueError, match=message):
        net.apply({"params": random_params(net)}, z, T_B, memory())


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match=r"'film'.*adaln-zero.*none"):
        random_params(make(conditioning="film"))
    with pytest.raises(ValueError, match=r"'noise'.*velocity.*data"):
        random_params(make(prediction="noise"))
    with pytest.raises(ValueError, match=r"'some'.*none.*full.*dots"):
        random_params(make(remat="some"))
    with pytest.raises(AssertionError):
        random_params(make()) and apply(make(), random_params(make()), t=T_B[:1])
