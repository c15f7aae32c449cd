"""Low-rank factors: which there are, what they compute, and their gradient, against W + s A B."""

from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import fusion, layers, lora
from tests import tiny

SCALE = 0.7
RANK = 3
KINDS = {
    "joint": {},
    "cross": {"memory": {"source": "shallow"}, "attention": "cross", "conditioning": "adaln-zero"},
}


def boxed(net):
    whole = jax.eval_shape(lambda key: fusion.init(net, key, tiny.LATENTS), jax.random.key(0))
    return {name: part for name, part in whole.items() if name != "llm"}


def random(abstract, seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, meta.unbox(abstract))


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    net = tiny.model(**KINDS[request.param])
    return net.clone(lora_scale=SCALE)


def merged(params, factors):
    """The parameters with W + s A B, by letters that name what each axis is."""
    flat, pairs = flatten_dict(params), flatten_dict(factors)
    letters = {"q": "lir,lrnh->linh", "k": "lir,lrnh->linh", "v": "lir,lrnh->linh"}
    letters |= {"cross_q": "lir,lrnh->linh"}
    letters |= dict.fromkeys(("attention_out", "cross_out"), "lnhr,lro->lnho")
    letters |= dict.fromkeys(("gate", "up", "down"), "lir,lro->lio")
    for path in pairs:
        if path[-1] == "a":
            a, b = pairs[path], pairs[*path[:-1], "b"]
            update = jnp.einsum(letters[path[-2]], a, b, precision="highest")
            flat[*path[:-1], "weight"] += SCALE * update
    return unflatten_dict(flat)


def velocity(net, variables, llm):
    z, t, ids, mask = tiny.inputs()
    features = net.apply({"params": {"llm": llm}}, ids, mask, method="read_text")
    memory = net.apply(variables, features, None, method="remember")
    return net.apply(variables, z, t, memory, method="denoise")


def split(net):
    params = tiny.params(net)
    llm = params.pop("llm")
    return params, llm


def test_which_products_have_factors_of_which_axes(net):
    abstract = boxed(net)
    found = flatten_dict(lora.factors(abstract, RANK, "all"), sep="/")
    shapes = {path: meta.unbox(x).shape for path, x in found.items()}
    names = {path: x.names for path, x in found.items()}
    assert shapes["dit/blocks/attention/q/a"] == (2, 24, RANK)
    assert shapes["dit/blocks/attention/q/b"] == (2, RANK, 4, 8)
    assert names["dit/blocks/attention/q/b"] == ("layers", "rank", "heads", "head")
    assert shapes["dit/blocks/attention_out/a"] == (2, 4, 8, RANK)
    assert names["dit/blocks/attention_out/a"] == ("layers", "heads", "head", "rank")
    assert names["dit/blocks/mlp/down/b"] == ("layers", "rank", "embed")
    modules = {path.rpartition("/")[0] for path in found}
    block = {"attention/q", "attention/k", "attention/v", "attention_out"}
    cross = net.dit.attention == "cross"
    block |= {"cross_q", "cross_out"} if cross else set()
    mlp = {f"dit/blocks/mlp/{name}" for name in ("gate", "up", "down")}
    memory = {"memory/layers/k", "memory/layers/v"} if cross else set()
    attention = {f"dit/blocks/{name}" for name in block} | memory
    assert modules == mlp | attention
    for products, wanted in (("mlp", mlp), ("attention", attention)):
        some = flatten_dict(lora.factors(abstract, RANK, products), sep="/")
        assert {path.rpartition("/")[0] for path in some} == wanted
    with pytest.raises(ValueError, match="Unknown products 'heads'"):
        lora.factors(abstract, RANK, "heads")


def test_at_first_the_model_is_its_base(net):
    params, llm = split(net)
    abstract = lora.factors(boxed(net), RANK, "all")
    factors = jax.jit(lambda key: lora.init(key, abstract))(jax.random.key(2))
    a, b = factors["dit"]["blocks"]["attention_out"].values()
    assert not b.any() and a.std() == pytest.approx(32**-0.5, rel=0.2)  # 4 heads of 8
    assert abs(np.corrcoef(np.reshape(a, (2, -1)))[0, 1]) < 0.4  # no two layers alike
    variables = fusion.variables(net, factors, {"base": params})
    draw = jax.jit(velocity, static_argnums=0)
    np.testing.assert_array_equal(draw(net, variables, llm), draw(net, {"params": params}, llm))


@pytest.mark.parametrize("remat", ["none", "products"])
def test_value_and_gradient_are_those_of_merged_weights(net, remat):
    net = net.clone(dit=net.dit.clone(remat=remat))
    params, llm = split(net)
    factors = random(lora.factors(boxed(net), RANK, "all"))
    up = np.random.default_rng(5).standard_normal((3, *tiny.LATENTS)).astype(np.float32)

    def ours(factors):
        return jnp.sum(up * velocity(net, fusion.variables(net, factors, {"base": params}), llm))

    def theirs(factors):
        return jnp.sum(up * velocity(net, {"params": merged(params, factors)}, llm))

    y, grads = jax.jit(jax.value_and_grad(ours))(factors)
    expected, wanted = jax.jit(jax.value_and_grad(theirs))(factors)
    np.testing.assert_allclose(y, expected, rtol=1e-4)
    tiny.close(grads, wanted, 2e-4)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_merged_is_the_same_sum():
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 8, 6), (4, 8, 2), (2, 6)))
    found = lora.merged(w, a, b, SCALE)
    np.testing.assert_allclose(found, w + SCALE * np.einsum("nhr,ro->nho", a, b), atol=1e-5)
    assert lora.merged(w.astype(jnp.bfloat16), a, b, SCALE).dtype == np.float32


def test_in_bfloat16_the_factors_are_cast():
    layer = layers.Einsum("BD,DF->BF", (8, 6), ("embed", "mlp"), dtype=jnp.bfloat16)
    x = jnp.ones((2, 8))
    params = {"weight": jnp.full((8, 6), 0.25)}
    factors = {"a": jnp.full((8, 2), 0.1), "b": jnp.full((2, 6), 0.5)}
    y = layer.apply({"params": params, "lora": factors}, x)
    plain = layer.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose((y - plain).astype(np.float32), 0.8, rtol=0.02)
