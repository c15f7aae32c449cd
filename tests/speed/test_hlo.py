"""What is read from a compiled program, against what was put into it and XLA's own counts."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from t2i_jax import sharding
from t2i_jax.speed import hlo

F32 = jnp.float32


def like(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def parsed(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return hlo.Program(compiled.as_text()), compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("turns", [1, 7])
def test_a_loop_counts_as_often_as_it_runs(turns):
    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program, _ = parsed(f, like(turns, 32, 32), like(5, 32))
    assert sum(program.flops().values()) == turns * 2 * 5 * 32 * 32


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))},
        {"window_strides": (2, 2), "padding": ((0, 1), (0, 1))},
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (1, 1), "padding": ((2, 1), (1, 3)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 2), "padding": ((2, 2), (2, 2)), "rhs_dilation": (2, 2)},
    ],
    ids=str,
)
def test_convolutions_are_counted_as_xla_does(options):
    def f(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)

    program, theirs = parsed(f, like(2, 13, 11, 3), like(3, 3, 3, 8))
    assert sum(program.flops().values()) == pytest.approx(theirs, rel=1e-6)


def test_products_are_counted_as_xla_does_and_by_part():
    def f(x, w):
        with jax.named_scope("dit"):
            y = jnp.einsum("bsd,dnh->bsnh", x, w)
        with jax.named_scope("llm"):
            return jnp.einsum("bsnh,btnh->bnst", y, y)

    program, theirs = parsed(f, like(2, 6, 8), like(8, 3, 4))
    found = program.flops()
    assert found == {"dit": 2 * 2 * 6 * 8 * 12, "llm": 2 * 2 * 3 * 6 * 6 * 4}
    assert sum(found.values()) == pytest.approx(theirs, rel=0.01)


COLLECTIVES = {  # what a device receives of a float32 array of 24 x 16 by 4 or 8 devices
    "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), P(), P(), 2 * 3 / 4 * 24 * 16 * 4),
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        P("fsdp"),
        P(),
        3 / 4 * 24 * 16 * 4,
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        P(),
        P("fsdp"),
        3 / 4 * 24 * 16 * 4,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
        P(None, "fsdp"),
        P("fsdp"),
        3 / 4 * 24 * 16 / 4 * 4,
    ),
}


@pytest.mark.parametrize("turns", [1, 5])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_are_what_a_device_receives(kind, turns):
    body, into, out, received = COLLECTIVES[kind]
    mesh = sharding.make_mesh(2, 4, 1)

    def f(x):
        def one(x, _):
            y = jax.shard_map(body, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)(x)
            return jnp.cos(y), None

        if turns == 1:
            return one(x, None)[0]
        return jax.lax.scan(one, x, None, length=turns)[0]

    place = jax.NamedSharding(mesh, into)
    compiled = jax.jit(f, in_shardings=place).lower(like(24, 16)).compile()
    found = [c for c in hlo.Program(compiled.as_text()).collectives(8) if c.kind == kind]
    turns *= 2 if kind == "all-to-all" and turns > 1 else 1  # and back, for the next one
    assert sum(c.count for c in found) == turns
    assert {c.group for c in found} == {4} and {c.dtypes for c in found} == {("f32",)}
    assert sum(c.bytes for c in found) == turns * received


FUSED = """HloModule m
%start (p: bf16[64,8]) -> (bf16[64,8], bf16[2048,8]) {
  %p = bf16[64,8]{1,0} parameter(0)
  %ag.1 = bf16[2048,8]{1,0} all-gather(%p), channel_id=6, replica_groups=GROUPS
  ROOT %c = (bf16[64,8], bf16[2048,8]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%end (q: bf16[64,8]) -> bf16[2048,8] {
  %q = bf16[64,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[2048,8]{1,0} all-gather(%q), channel_id=6, replica_groups=GROUPS
}

%all-reduce-scatter.1 (r: f32[64,8]) -> f32[2,8] {
  %r = f32[64,8]{1,0} parameter(0)
  %ar = f32[64,8]{1,0} all-reduce(%r), channel_id=7, replica_groups=[4,32]<=[128], to_apply=%add
  ROOT %ds = f32[2,8]{1,0} dynamic-slice(%ar)
}

ENTRY %main (x: bf16[64,8], y: f32[64,8]) -> bf16[2048,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = f32[64,8]{1,0} parameter(1)
  %f.1 = (bf16[64,8], bf16[2048,8]) fusion(%x), kind=kCustom, calls=%start
  %f.3 = f32[2,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %lone = f32[64,8]{1,0} all-reduce(%y), channel_id=8, replica_groups={{0},{1}}, to_apply=%add
  ROOT %f.2 = bf16[2048,8]{1,0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_what_tpus_make_of_collectives():
    """A gather inside other work counts once; a sum that is sliced at once is a scattered one."""
    gather, scatter = hlo.Program(FUSED.replace("GROUPS", "mesh['a'=32,'b'=4] {'a'}")).collectives(
        128
    )
    assert (gather.kind, gather.count, gather.group) == ("all-gather", 1, 32)
    assert gather.asynchronous and gather.bytes == 31 * 64 * 8 * 2
    assert (scatter.kind, scatter.count, scatter.group) == ("reduce-scatter", 1, 32)
    assert not scatter.asynchronous and scatter.bytes == 31 / 32 * 64 * 8 * 4


def test_the_largest_arrays_and_where_they_come_from():
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable)
    def body(x, w):
        return sharding.product(x, w, ("embed", "mlp"), w.shape), None

    def f(w, x):
        return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    program, _ = parsed(jax.grad(f), like(6, 64, 64), like(128, 64))
    ((array, _, _),) = program.largest(1)
    assert array.shape in ((6, 64, 64), (6, 128, 64)) and array.bytes == 4 * 6 * 64 * array.shape[1]
    assert any("t2i_jax/sharding.py:" in line for _, _, line in program.largest(6))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_and_masks_are_found_where_they_are_in_memory(dtype):
    """Attention that is written out has them, of 24 queries by 40 keys; what is summed has not."""

    def attention(q, k, v, lengths):
        seen = jnp.arange(40) < lengths[:, None, None]
        scores = jnp.where(seen, jnp.einsum("bid,bjd->bij", q, k), -1e9)
        return jnp.einsum(
            "bij,bjd->bid", jax.nn.softmax(scores.astype(jnp.float32)).astype(dtype), v
        )

    shapes = [(2, 24, 8), (2, 40, 8), (2, 40, 8)]
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    given.append(jax.ShapeDtypeStruct((2,), jnp.int32))
    program = hlo.Program(jax.jit(attention).lower(*given).compile().as_text())
    found = program.across([(24, 40)])
    assert found and all({24, 40} <= set(array.shape) for array, _, _ in found)
    assert program.across([(24, 41), (40, 40)]) == []
