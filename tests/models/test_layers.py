"""Every layer against its closed form in NumPy, float64."""

import math

from flax.core import meta
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import layers

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def initialise(layer, x):
    """Unboxed parameters; `init` is a field of some layers."""
    _, variables = layer.init_with_output(jax.random.key(1), x)
    return meta.unbox(variables["params"])


EQUATIONS = [
    ("BSD,DNH->BSNH", (6, 2, 5), 1),
    ("BSNH,NHD->BSD", (2, 5, 6), 2),
    ("BIpqC,pqCD->BID", (2, 2, 3, 6), 3),
    ("BID,DpqC->BIpqC", (6, 2, 2, 3), 1),
    ("BE,EMD->BMD", (6, 4, 5), 1),
]


@pytest.mark.parametrize("equation, shape, contracted", EQUATIONS)
def test_einsum_is_numpys(equation, shape, contracted):
    rows = (3, 4) if equation.startswith(("BS", "BI")) else (3,)
    x, w, bias = normal(*rows, *shape[:contracted]), normal(*shape), normal(*shape[contracted:])
    layer = layers.Einsum(equation, shape, (None,) * len(shape), bias=True)
    actual = layer.apply({"params": {"weight": w, "bias": bias}}, x)
    expected = np.einsum(equation, np.float64(x), np.float64(w)) + bias
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("equation, shape, contracted", EQUATIONS)
def test_the_default_is_xavier_uniform(equation, shape, contracted):
    shape = tuple(4 * size for size in shape)
    layer = layers.Einsum(equation, shape, (None,) * len(shape), bias=True)
    ranks = {"BS": 2, "BI": 2, "BE": 1}[equation[:2]]
    x = jnp.zeros((1,) * ranks + shape[:contracted])
    params = initialise(layer, x)
    bound = math.sqrt(6 / (math.prod(shape[:contracted]) + math.prod(shape[contracted:])))
    weight = np.asarray(params["weight"])
    assert 0.99 * bound < np.abs(weight).max() <= bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(weight.mean()) < 0.03 * bound
    assert not params["bias"].any()


@pytest.mark.parametrize("equation", ["BSD,ND->BSN", "BSNH,HND->BSD", "BSD,DN->BNS", "BSD,DN->BS"])
def test_what_is_not_a_linear_map_of_the_last_axes_is_refused(equation):
    shape = (4,) * len(equation.split(",")[1].split("->")[0])
    x = jnp.zeros((4,) * len(equation.split(",")[0]))
    with pytest.raises(ValueError, match="does not map the last axes"):
        initialise(layers.Einsum(equation, shape, (None,) * len(shape)), x)


def test_rms_norm():
    x, weight = 3 * normal(2, 3, 8), normal(8)
    x64 = np.float64(x)
    rms = np.sqrt((x64**2).sum(-1, keepdims=True) / 8 + 0.01)
    actual = layers.RMSNorm(0.01).apply({"params": {"weight": weight}}, x)
    np.testing.assert_allclose(actual, x64 / rms * (1 + weight), rtol=0, atol=1e-5)
    low = layers.RMSNorm().apply({"params": {"weight": weight}}, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert not initialise(layers.RMSNorm(), x)["weight"].any()  # a factor of one


def test_rms_norm_without_an_offset():
    x, weight = 3 * normal(2, 3, 8), normal(8)
    rms = np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True) + 0.01)
    norm = layers.RMSNorm(0.01, offset=0.0)
    actual = norm.apply({"params": {"weight": weight}}, x)
    np.testing.assert_allclose(actual, x / rms * weight, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(initialise(norm, x)["weight"], np.ones(8))  # a factor of one


def tanh_gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("options, activation", [({}, tanh_gelu), ({"activation": "silu"}, silu)])
def test_gated_mlp(options, activation):
    x, gate, up, down = normal(2, 3, 4), normal(4, 7), normal(4, 7), normal(7, 4)
    weights = {"gate": gate, "up": up, "down": down}
    params = {name: {"weight": w} for name, w in weights.items()}
    h, u = np.float64(x) @ gate, np.float64(x) @ up
    actual = layers.GatedMLP(4, 7, **options).apply({"params": params}, x)
    np.testing.assert_allclose(actual, (activation(h) * u) @ down, rtol=0, atol=1e-4)


def test_an_unknown_activation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'relu'.*gelu.*silu"):
        initialise(layers.GatedMLP(4, 7, activation="relu"), normal(2, 3, 4))


def test_the_embedding_is_tied():
    table = normal(9, 4)
    embed, variables = layers.Embed(9, 4), {"params": {"weight": table}}
    ids = np.array([[1, 8], [0, 1]])
    encoded = embed.apply(variables, ids, method="encode")
    np.testing.assert_array_equal(encoded, table[ids])
    logits = embed.apply(variables, encoded, method="decode")
    np.testing.assert_allclose(logits, table[ids] @ table.T, rtol=1e-5, atol=1e-5)
    low = layers.Embed(9, 4, jnp.bfloat16)
    assert low.apply(variables, ids, method="encode").dtype == jnp.bfloat16
    assert low.apply(variables, encoded, method="decode").dtype == jnp.float32


class Affine(nn.Module):
    """x w + b y: a block whose repetition has a closed form."""

    @nn.compact
    def __call__(self, x, own, shared):
        w = self.param("w", layers.with_axes(nn.initializers.normal(1.0), ("embed",)), (2,))
        x = x * w + own + shared
        return x, 10 * x


@pytest.mark.parametrize("unroll", [1, 3])
def test_scanned_layers_have_their_own_inputs_and_parameters(unroll):
    block = layers.scan_layers(Affine, 3, (0, nn.broadcast), unroll)()
    x, own, shared = normal(2), normal(3, 2), normal(2)
    boxed = block.init(jax.random.key(0), x, own, shared)["params"]
    assert boxed["w"].names == ("layers", "embed")
    w = np.asarray(boxed["w"].value)
    assert w.shape == (3, 2) and len(np.unique(w)) == 6
    carry, outputs = block.apply({"params": {"w": w}}, x, own, shared)
    expected = []
    for i in range(3):
        x = x * w[i] + own[i] + shared
        expected.append(10 * x)
    np.testing.assert_allclose(carry, x, rtol=1e-6)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


def test_an_unknown_remat_policy_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'half'.*none.*products.*full"):
        layers.remat(Affine, "half")
