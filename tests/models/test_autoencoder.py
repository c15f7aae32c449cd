"""The autoencoder's parts against plain NumPy, its sizes, and the interface around it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from t2i_jax import sharding
from t2i_jax.models import autoencoder

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}


def randomised(init, *args):
    """Every parameter random, norms and biases too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (
            (rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 4) ** 0.5).astype("f4")
            + (x.ndim == 1)
        ),
        nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *args)),
    )


def run(module, x):
    variables = randomised(module.init, x)
    return np.asarray(jax.jit(module.apply)(variables, x)), jax.tree.map(
        np.float64, variables["params"]
    )


def call(ae, params, method, x):
    """The network alone, unscaled."""
    return jax.jit(lambda p, x: ae.net.apply({"params": p}, x, method=method))(params, x)


def conv(x, p, stride=1, pad=(1, 1)):
    """The sum over taps, each image and channel apart, by SciPy."""
    x = np.pad(np.float64(x), ((0, 0), pad, pad, (0, 0)))
    weight = p["weight"]
    out = [
        sum(correlate2d(image[..., i], weight[..., i, o], "valid") for i in range(x.shape[-1]))
        for image in x
        for o in range(weight.shape[-1])
    ]
    out = np.reshape(out, (len(x), weight.shape[-1], *out[0].shape)).transpose(0, 2, 3, 1)
    return out[:, ::stride, ::stride] + p["bias"]


def norm(x, p, groups):
    out = np.empty(x.shape)
    size = x.shape[-1] // groups
    for image, y in zip(np.float64(x), out, strict=True):
        for g in range(0, x.shape[-1], size):
            part = image[..., g : g + size]
            y[..., g : g + size] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return out * p["weight"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def resnet(x, p):
    h = conv(silu(norm(x, p["norm1"], 4)), p["conv1"])
    h = conv(silu(norm(h, p["norm2"], 4)), p["conv2"])
    return h + (conv(x, p["shortcut"], pad=(0, 0)) if "shortcut" in p else x)


def attention(x, p):
    h = norm(x, p["norm"], 4).reshape(len(x), -1, x.shape[-1])
    q, k, v = (h @ p[n]["weight"] + p[n]["bias"] for n in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(x.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    h = weights / weights.sum(-1, keepdims=True) @ v @ p["out"]["weight"] + p["out"]["bias"]
    return x + h.reshape(x.shape)


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def middle_and_out(x, p, stages):
    """The tail of the encoder; the decoder has its stages in between."""
    x = resnet(
        attention(resnet(x, p["mid"]["resnet_0"]), p["mid"]["attention"]), p["mid"]["resnet_1"]
    )
    return conv(silu(norm(stages(x), p["norm_out"], 4)), p["conv_out"])


def close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) < tolerance * np.linalg.norm(expected)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(3.0, 2.0, size=(2, 6, 4, 8)).astype("f4")


@pytest.mark.parametrize("size", [1.0, 1e-3])  # epsilon counts for the second
def test_group_norm(x, size):
    x = (x * size).astype("f4")
    y, p = run(autoencoder.GroupNorm(4), x)
    close(y, norm(x, p, 4))


@pytest.mark.parametrize("features", [8, 12])
def test_resnet(x, features):
    y, p = run(autoencoder.ResNet(features, 4, jnp.float32), x)
    assert ("shortcut" in p) == (features != 8)
    close(y, resnet(x, p))


def test_attention_is_over_all_pixels_with_one_head(x):
    y, p = run(autoencoder.Attention(4, jnp.float32), x)
    close(y, attention(x, p))


def test_downsampling_pads_below_and_right_alone(x):
    y, p = run(autoencoder.Stage(8, 0, "down", 4, jnp.float32), x)
    close(y, conv(x, p["downsample"], stride=2, pad=(0, 1)))


def test_upsampling_repeats_pixels(x):
    y, p = run(autoencoder.Stage(8, 0, "up", 4, jnp.float32), x)
    close(y, conv(double(x), p["upsample"]))


@pytest.mark.parametrize("quant", [False, True])
def test_whole_network(quant):
    both = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    ae = autoencoder.make("kl", 2, 2, 1.0, 0.0, **SMALL, **both)
    params = randomised(ae.init)
    assert ("quant_conv" in params) == ("post_quant_conv" in params) == quant
    p = jax.tree.map(np.float64, params)
    rng = np.random.default_rng(2)

    images = rng.uniform(-1, 1, (2, 6, 4, 3)).astype("f4")
    e = p["encoder"]
    h = resnet(conv(images, e["conv_in"]), e["down_0"]["resnet_0"])
    h = conv(h, e["down_0"]["downsample"], stride=2, pad=(0, 1))
    h = middle_and_out(resnet(h, e["down_1"]["resnet_0"]), e, lambda h: h)
    h = conv(h, p["quant_conv"], pad=(0, 0)) if quant else h
    moments = call(ae, params, "encode", images)
    close(moments.mean, h[..., :2], 1e-5)
    close(moments.logvar, h[..., 2:], 1e-5)

    def up(h):
        h = resnet(resnet(h, d["up_0"]["resnet_0"]), d["up_0"]["resnet_1"])
        h = conv(double(h), d["up_0"]["upsample"])
        return resnet(resnet(h, d["up_1"]["resnet_0"]), d["up_1"]["resnet_1"])

    latents = rng.normal(size=(2, 3, 2, 2)).astype("f4")
    d = p["decoder"]
    h = conv(latents, p["post_quant_conv"], pad=(0, 0)) if quant else latents
    h = middle_and_out(conv(h, d["conv_in"]), d, up)
    close(call(ae, params, "decode", latents), h, 1e-5)


def test_parameters_of_the_published_networks():
    def count(**architecture):
        ae = autoencoder.make("kl", **{"downsample": 8, "scale": 1.0, "shift": 0.0, **architecture})
        params = nn.meta.unbox(jax.eval_shape(ae.init, jax.random.key(0)))
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    assert count(channels=16) == 83_819_683  # SD3, FLUX
    quant = {"use_quant_conv": True, "use_post_quant_conv": True}
    assert count(channels=4, **quant) == 83_653_863  # SD1, SDXL


def test_every_parameter_is_replicated():
    ae = autoencoder.make("kl", 2, 2, 1.0, 0.0, use_quant_conv=True, **SMALL)
    mesh = sharding.make_mesh()
    shardings = sharding.param_shardings(jax.eval_shape(ae.init, jax.random.key(0)), mesh)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings))


def test_interface_scales_and_samples():
    ae = autoencoder.make("kl", 2, 2, 1.5, 0.25, **SMALL)
    params = randomised(ae.init)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 4, 3)).astype("f4")
    key = jax.random.key(5)

    @jax.jit
    def both(params, images):
        moments = ae.net.apply({"params": params}, images, method="encode")
        sample = moments.sample(key)
        decoded = ae.net.apply({"params": params}, sample, method="decode")
        mean, latents = ae.encode(params, images, None), ae.encode(params, images, key)
        return moments.mean, sample, decoded, mean, latents, ae.decode(params, latents)

    alone_mean, alone_sample, alone_decoded, mean, latents, decoded = both(params, images)
    assert ae.downsample == 2 and ae.channels == 2 and mean.shape == (3, 4, 2, 2)
    assert np.abs(alone_sample - alone_mean).max() > 1e-2
    close(mean, (np.asarray(alone_mean) - 0.25) * 1.5)
    close(latents, (np.asarray(alone_sample) - 0.25) * 1.5)
    close(decoded, np.asarray(alone_decoded))


def test_samples_have_their_moments():
    mean, logvar = np.meshgrid([-1.0, 2.0], [-4.0, 0.0, 1.0])
    moments = autoencoder.Moments(jnp.asarray(mean, "f4"), jnp.asarray(logvar, "f4"))
    samples = jax.vmap(moments.sample)(jax.random.split(jax.random.key(3), 20_000))
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(samples.var(0), np.exp(logvar), rtol=0.05)


def test_logvar_is_clipped():
    ae = autoencoder.make("kl", 1, 2, 1.0, 0.0, **SMALL)
    params = randomised(ae.init)
    images = np.zeros((1, 2, 2, 3), "f4")
    encode = jax.jit(lambda p: ae.net.apply({"params": p}, images, method="encode"))
    for bias, limit in ((1e4, 20.0), (-1e4, -30.0)):
        params["encoder"]["conv_out"]["bias"] = np.array([0.0, bias], "f4")
        np.testing.assert_array_equal(encode(params).logvar, np.full((1, 1, 1, 1), limit))


def test_bfloat16_is_near_float32():
    ae = autoencoder.make("kl", 2, 2, 1.0, 0.0, **SMALL)
    half = autoencoder.make("kl", 2, 2, 1.0, 0.0, dtype=jnp.bfloat16, **SMALL)
    params = randomised(ae.init)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("f4")
    exact = np.asarray(call(ae, params, "__call__", images))
    rounded = call(half, params, "__call__", images)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 5e-2


def test_identity():
    ae = autoencoder.make("identity", 3, 1, 2.0, 0.5)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 5, 7, 3)).astype("f4")
    params = ae.init(jax.random.key(0))
    assert params == {}
    for key in (None, jax.random.key(1)):
        latents = jax.jit(ae.encode)(params, images, key)
        np.testing.assert_allclose(latents, (images - 0.5) * 2.0, rtol=1e-6)
    np.testing.assert_allclose(ae.decode(params, latents), images, atol=1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "vq"}, r"autoencoder.kind 'vq'; known: \['kl', 'identity'\]"),
        ({"downsample": 8}, "autoencoder.downsample is 8, but its network has 2"),
        ({"kind": "identity", "downsample": 1}, "no architecture"),
        ({"scale": 0.0}, "autoencoder.scale 0.0"),
        ({"shift": float("nan")}, "shift nan"),
        ({"net": autoencoder.AutoencoderKL(4, (8, 16))}, "channels is 2, but its network has 4"),
    ],
)
def test_make_refuses(wrong, message):
    right = {"kind": "kl", "channels": 2, "downsample": 2, "scale": 1.0, "shift": 0.0, **SMALL}
    with pytest.raises(ValueError, match=message):
        autoencoder.make(**(right | wrong))


def test_identity_refuses_other_channels():
    with pytest.raises(ValueError, match="channels is 4, but its network has 3"):
        autoencoder.make("identity", 4, 1, 1.0, 0.0)


def test_shapes_are_refused():
    ae = autoencoder.make("kl", 2, 2, 1.0, 0.0, **SMALL)
    params = randomised(ae.init)
    with pytest.raises(ValueError, match=r"\(1, 6, 5, 3\): H and W must be multiples of 2"):
        ae.encode(params, jnp.zeros((1, 6, 5, 3)), None)
    with pytest.raises(ValueError, match="C = 3"):
        ae.encode(params, jnp.zeros((1, 6, 6, 4)), None)
    with pytest.raises(ValueError, match="C = 2"):
        ae.decode(params, jnp.zeros((1, 6, 6, 4)))
    with pytest.raises(ValueError, match="multiples of norm_groups 32"):
        autoencoder.make("kl", 2, 1, 1.0, 0.0, block_out_channels=(48,)).init(jax.random.key(0))
