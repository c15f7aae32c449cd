"""The whole model: the memory is a constant of the prompt, and who influences whom."""

import functools

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import fusion
from t2i_jax.models.llm import LLM
from t2i_jax.sharding import to_spec
from tests import tiny

NET = tiny.model()
FAMILY = {  # the paper's four pairs, and two sources more
    "deep joint": NET,
    "deep cross": tiny.model(attention="cross"),
    "shallow joint": tiny.model(memory={"source": "shallow"}),
    "shallow cross": tiny.model(memory={"source": "shallow"}, attention="cross"),
    "middle": tiny.model(memory={"source": "middle", "first_layer": 1}, num_layers=4),
    "mixture": tiny.model(memory={"source": "mixture"}),
}
family = pytest.mark.parametrize("net", FAMILY.values(), ids=FAMILY)
Z, T_B, IDS, MASK = tiny.inputs()


@pytest.fixture(scope="module")
def params():
    return tiny.params(NET)


@functools.partial(jax.jit, static_argnums=0)
def run(net, params, *inputs):
    return net.apply({"params": params}, *inputs)


def whole(params, z=Z, t=T_B, ids=IDS, mask=MASK, net=NET):
    return run(net, params, z, t, ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def encode(net, params):
    return net.apply({"params": params}, IDS, MASK, method="encode_text")


def remember(params, net=NET):
    return encode(net, {name: part for name, part in params.items() if name != "dit"})


def denoise(params, memory, z=Z, t=T_B, net=NET):
    only = {"params": {"dit": params["dit"]}}
    return net.apply(only, z, t, memory, method="denoise")


@family
def test_a_memory_made_once_serves_every_step(net):
    params = tiny.params(net)
    memory = remember(params, net)
    step = jax.jit(lambda z, t: denoise(params, memory, z, t, net))
    for z, t in ((Z, T_B), (2 * Z, T_B / 3)):
        tiny.close(step(z, t), whole(params, z, t, net=net))


def test_the_image_has_no_influence_on_the_text(params):
    """The derivative of all that the LLM and the memory are, along any change of the latents."""

    def of_the_text(module, method):
        return isinstance(module, LLM) or method == "remember"

    def text(z):
        _, kept = NET.apply(
            {"params": params}, z, T_B, IDS, MASK, capture_intermediates=of_the_text
        )
        kept = kept["intermediates"]
        assert {"llm", "remember"} <= kept.keys()
        return [x for x in jax.tree.leaves(kept) if x.dtype == jnp.float32]

    values, tangents = jax.jit(lambda z, dz: jax.jvp(text, (z,), (dz,)))(Z, np.ones_like(Z))
    assert len(values) == 5  # keys, values, hidden state; keys, values
    assert all(np.asarray(x).any() for x in values)
    assert not any(np.asarray(x).any() for x in tangents)


@family
def test_padding_has_no_influence_and_every_word_has(net):
    """No token is used twice, so a row of the embedding is a place in a prompt."""
    params = tiny.params(net)

    @jax.jit
    @jax.grad
    def reached(table):
        llm = {**params["llm"], "embed": {"weight": table}}
        return jnp.square(net.apply({"params": {**params, "llm": llm}}, Z, T_B, IDS, MASK)).sum()

    influence = np.abs(np.asarray(reached(params["llm"]["embed"]["weight"]))).sum(-1)
    np.testing.assert_array_equal(influence[IDS] > 0, MASK)
    unused = np.setdiff1d(np.arange(len(influence)), IDS)
    assert not influence[unused].any()


def test_every_pixel_moves_the_whole_velocity_of_its_row_and_of_no_other(params):
    memory = remember(params)
    colour = np.array([0.7, -0.5, 0.3], np.float32)

    def velocity(amount):  # (B, H, W), added to every pixel along `colour`
        return denoise(params, memory, Z + amount[..., None] * colour)

    jacobian = jax.jit(jax.jacfwd(velocity))(np.zeros(Z.shape[:3], np.float32))
    moved = np.asarray(jacobian).any(3)  # (B, H, W) by (B, H, W)
    for i, j in np.ndindex(3, 3):
        assert moved[i, :, :, j].all() if i == j else not moved[i, :, :, j].any()


@family
def test_rows_in_another_order_give_the_same_in_that_order(net):
    params, order = tiny.params(net), np.array([2, 0, 1])
    turned = whole(params, Z[order], T_B[order], IDS[order], MASK[order], net=net)
    tiny.close(turned, np.asarray(whole(params, net=net))[order])


@family
def test_bfloat16_is_near_float32(net):
    """Its numbers have 8 bits; through an LLM of three layers and a few blocks, some per cent."""
    low, params = tiny.in_bfloat16(net), tiny.params(net)
    velocity, exact = np.asarray(whole(params, net=low)), np.asarray(whole(params, net=net))
    assert velocity.dtype == np.float32
    error = np.linalg.norm(velocity - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.06, error
    memory = remember(params, net=low)
    assert memory.keys_LBTKH.dtype == memory.values_LBTKH.dtype == jnp.bfloat16
    masters = jax.eval_shape(lambda key: fusion.init(low, key, tiny.LATENTS), jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(masters))


def test_the_llm_starts_with_keys_of_unit_variance_and_every_parameter_has_axes(params):
    boxed = jax.jit(lambda key: fusion.init(NET, key, tiny.LATENTS))(jax.random.key(3))
    fresh = meta.unbox(boxed)
    assert flatten_dict(fresh).keys() == flatten_dict(params).keys()
    memory = remember(fresh)
    for part in (memory.keys_LBTKH, memory.values_LBTKH):
        assert np.asarray(part)[:, MASK].std() == pytest.approx(1.0, rel=0.3)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert len(leaf.names) == leaf.value.ndim
        to_spec(leaf.names)


def test_which_layers_of_the_llm_are_shared_ones():
    """Those attend plainly; an LLM that is only read is as published."""
    shared = {name: net.llm.num_plain for name, net in FAMILY.items()}
    assert shared == dict(zip(FAMILY, (2, 2, 0, 0, 2, 2), strict=True))
    own = {"softcap": 5.0, "query_scalar": 3.0}
    net = tiny.model(llm=own)
    assert (net.dit.softcap, net.dit.query_scalar, net.llm.num_plain) == (0, 0, 2)
    net = tiny.model(llm=own | {"softcap_shared": True})
    assert (net.dit.softcap, net.dit.query_scalar, net.llm.num_plain) == (5.0, 3.0, 0)
    net = tiny.model(llm=own | {"softcap_shared": True}, memory={"source": "shallow"})
    assert (net.dit.softcap, net.llm.num_plain) == (0, 0)


def test_a_soft_cap_in_shared_layers_is_on_the_images_scores_too(params):
    """Without scores, every key weighs the same: a cap of almost 0 is the mean of all values."""
    memory = remember(params)
    capped = NET.clone(dit=NET.dit.clone(softcap=1e-7))
    mean = NET.clone(dit=NET.dit.clone(query_scalar=1e30))
    tiny.close(denoise(params, memory, net=capped), denoise(params, memory, net=mean))
    assert np.abs(denoise(params, memory, net=mean) - denoise(params, memory)).max() > 1e-2


def test_wrong_fields_are_refused():
    with pytest.raises(TypeError, match="widht"):
        tiny.model(widht=3)
    with pytest.raises(TypeError, match="num_head"):
        tiny.model(llm={"num_head": 3})
    with pytest.raises(ValueError, match=r"4 layers.*3 layers"):
        tiny.params(tiny.model(num_layers=4))
    with pytest.raises(AssertionError):
        NET.apply({"params": {}}, IDS, MASK[:, 1:], method="encode_text")
