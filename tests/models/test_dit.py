"""The diffusion transformer: its patches, its conditioning, and the loop over its layers."""

import functools

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import conditioning, dit, layers, positions
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
    return TextMemory(keys, values, np.ones(num_layers, bool), MASK, MASK.sum(-1))


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


def literal(net, params, text):
    """The network as its docstrings have it: a Python loop over blocks."""
    modulated = net.conditioning == "adaln-zero"
    silu = jax.nn.silu
    x = jnp.einsum("BIpqC,pqCD->BID", dit.patchify(Z, 2), params["patch_embed"]["weight"])
    x += params["patch_embed"]["bias"]
    if modulated:
        hidden, out = (params["time_embed"]["time"][name] for name in ("hidden", "out"))
        time = silu(conditioning.timestep_features(1000 * T_B) @ hidden["weight"] + hidden["bias"])
        time = time @ out["weight"] + out["bias"]
    angles = positions.image_angles(
        net.positions, (2, 3), MASK.sum(-1), net.head_width, net.rope_theta
    )
    block = dit.DiTBlock(
        *(getattr(net, name) for name in HEADS),
        net.mlp_width,
        *(net.attention, net.conditioning, net.qk_norm, net.normalise_text, net.sandwich_norm),
        *(net.norm_eps, jnp.float32),
    )
    for i in range(net.num_layers):
        own = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        layer = (text.keys_LBTKH[i], text.values_LBTKH[i], text.seen_L[i])
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
    text = tuple(x[0] for x in (memory(1).keys_LBTKH, memory(1).values_LBTKH, memory(1).seen_L))
    angles = positions.image_angles("2d-rope", (2, 3), MASK.sum(-1), 8, 100.0)
    block = dit.DiTBlock(
        *(4, 2, 8, 32, "joint", "adaln-zero", True, False, sandwich, 1e-6, jnp.float32)
    )
    actual, _ = jax.jit(block.apply)({"params": own}, x, text, time, MASK, angles)
    expected = jax.jit(literal_block, static_argnums=5)(own, x, time, text, angles, sandwich)
    tiny.close(actual, expected)


def test_variants_have_their_parameters_and_no_others():
    def paths(**fields):
        return set(flatten_dict(random_params(make(**fields)), sep="/"))

    full = paths()
    timed = {p for p in full if "time_embed" in p or "modulation" in p}
    embedding = {p for p in full if "time_embed" in p}
    assert len(timed) == 8 and len(embedding) == 4
    assert full - paths(conditioning="none") == timed
    assert full - paths(conditioning="addition") == timed - embedding
    single = {"shared_modulation/linear/weight", "shared_modulation/linear/bias"}
    single |= {"blocks/modulation/table", "final_modulation/table"}
    assert paths(conditioning="adaln-single") == full - timed | embedding | single
    assert full - paths(qk_norm=False) == {"blocks/q_norm/weight", "blocks/k_norm/weight"}
    posts = {"blocks/attention_post_norm/weight", "blocks/mlp_post_norm/weight"}
    assert paths(sandwich_norm=True) - full == posts
    cross = {f"blocks/cross_{name}/weight" for name in ("q", "q_norm", "out")}
    assert paths(attention="cross") - full == cross
    assert paths(attention="cross", normalise_text=True) - full == cross | {
        "blocks/cross_k_norm/weight"
    }
    assert paths(normalise_text=True) == full
    sandwich = paths(attention="cross", sandwich_norm=True)
    assert sandwich - full == cross | posts | {"blocks/cross_post_norm/weight"}


def softmax_attention(q, k, v, seen):
    """Heads of width 8, two query heads for one of keys."""
    k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
    scores = jnp.einsum("BINH,BSNH->BNIS", q, k) / jnp.sqrt(8.0)
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None])
    return jnp.einsum("BNIS,BSNH->BINH", weights, v)


@pytest.mark.parametrize("normalise_text", [False, True])
def test_cross_attention_is_a_second_attention_of_its_own(normalise_text):
    """x + out(attention(q(x), text)), without a norm before it: as published."""
    net = make(num_layers=1, attention="cross", conditioning="none", normalise_text=normalise_text)
    params, text = random_params(net), memory(1)
    own = jax.tree.map(lambda p: p[0], params["blocks"])
    x = np.random.default_rng(1).standard_normal((3, 6, net.width)).astype(np.float32)
    fields = (4, 2, 8, 32, "cross", "none", True, normalise_text, False, 1e-6, jnp.float32)
    block = dit.DiTBlock(*fields)
    layer = (text.keys_LBTKH[0], text.values_LBTKH[0])
    run = jax.jit(
        lambda own, seen: block.apply({"params": own}, x, (*layer, seen), None, MASK, None)[0]
    )

    def norm(name, h):
        return layers.RMSNorm(1e-6).apply({"params": own[name]}, h)

    def after_the_image(with_text):
        h = norm("attention_norm", x)
        q, k, v = (jnp.einsum("BSD,DNH->BSNH", h, own["attention"][n]["weight"]) for n in "qkv")
        a = softmax_attention(norm("q_norm", q), norm("k_norm", k), v, np.ones((3, 6), bool))
        y = x + jnp.einsum("BINH,NHD->BID", a, own["attention_out"]["weight"])
        if with_text:
            q = norm("cross_q_norm", jnp.einsum("BSD,DNH->BSNH", y, own["cross_q"]["weight"]))
            keys = norm("cross_k_norm", layer[0]) if normalise_text else layer[0]
            a = softmax_attention(q, keys, layer[1], MASK)
            y = y + jnp.einsum("BINH,NHD->BID", a, own["cross_out"]["weight"])
        mlp = layers.GatedMLP(net.width, 32)
        return y + mlp.apply({"params": own["mlp"]}, norm("mlp_norm", y))

    tiny.close(run(own, True), after_the_image(True))
    tiny.close(run(own, False), after_the_image(False))  # a layer that sees no text


def test_a_joint_layer_that_is_not_to_see_the_text_does_not():
    net = make(num_layers=2)
    params, one, other = random_params(net), memory(2), memory(2, seed=1)

    def velocity(text, seen):
        text = text.replace(seen_L=np.array(seen))
        return jax.jit(net.apply)({"params": params}, Z, T_B, text)

    blind = velocity(one, [False, False])
    np.testing.assert_array_equal(blind, velocity(other, [False, False]))
    for seen in ([True, False], [False, True]):
        assert np.abs(velocity(one, seen) - velocity(other, seen)).max() > 1e-3
        assert np.abs(velocity(one, seen) - blind).max() > 1e-3


def test_a_pooled_embedding_is_added_to_the_time():
    net = make(pooled_width=5)
    text = memory().replace(pooled_BP=np.ones((3, 5), np.float32))
    boxed = jax.eval_shape(net.init, jax.random.key(0), Z, T_B, text)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.25 * rng.standard_normal(x.shape).astype(np.float32), meta.unbox(boxed)
    )
    run = jax.jit(
        lambda pooled: net.apply({"params": params}, Z, T_B, text.replace(pooled_BP=pooled))
    )
    moved = np.abs(run(text.pooled_BP) - run(text.pooled_BP * np.array([1, 1, 1, 1, -1.0], "f4")))
    assert moved.max() > 1e-3
    with pytest.raises(ValueError, match="of width 5, given was none"):
        net.apply({"params": params}, Z, T_B, memory())


def test_without_conditioning_the_time_is_not_seen():
    for name in conditioning.CONDITIONING:
        net, seen = make(conditioning=name), name != "none"
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
    # Done again: of attention the scores; the modulation, q, k, v, what leaves attention, gate
    # and up as well; the weighted values and what leaves the MLP, for its gate, too.
    for policy, again in {"products": 1, "outputs": 8, "full": 10}.items():
        more, same = gradient(policy)
        tiny.close(same, grads)
        assert more == products + again, policy
    tiny.close(gradient("offload")[1], grads)


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
    cross = make(num_layers=3, attention="cross", conditioning="adaln-single")
    fresh = meta.unbox(jax.jit(cross.init)(jax.random.key(0), Z, T_B, memory(3))["params"])
    for name, fans in (("cross_q", 24 + 32), ("cross_out", 32 + 24)):
        weight = np.asarray(fresh["blocks"][name]["weight"])
        assert weight.std() == pytest.approx(np.sqrt(2 / fans), rel=0.05)
    assert fresh["final_modulation"]["table"].std() == pytest.approx(24**-0.5, rel=0.3)
    patch = np.asarray(flat["patch_embed/weight"])  # as a linear layer of 2 * 2 * 3 inputs
    bound = np.sqrt(6 / (12 + 24))
    assert 0.95 * bound < np.abs(patch).max() <= bound
    assert patch.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)


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
    with pytest.raises(ValueError, match=r"'self'.*joint.*cross"):
        random_params(make(attention="self"))
    with pytest.raises(ValueError, match=r"pooled_width 5 needs.*not 'none'"):
        random_params(make(conditioning="none", pooled_width=5))
    with pytest.raises(ValueError, match=r"'noise'.*velocity.*data"):
        random_params(make(prediction="noise"))
    with pytest.raises(ValueError, match=r"'some'.*none.*products.*full"):
        random_params(make(remat="some"))
    with pytest.raises(AssertionError):
        random_params(make()) and apply(make(), random_params(make()), t=T_B[:1])
