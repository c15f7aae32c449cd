"""The layers that every network here is made of. Each owns its weight, its einsum and its axes.

Shape letters: B batch, T text or I image tokens (S either), D width, N query heads, K key/value
heads, H head width, F feed-forward width.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2i_jax.models.attention_tpu import RESIDUALS
from t2i_jax.sharding import product, take_rows, with_axes

Dtype = Any
Init = Callable[..., Callable[..., jax.Array]]  # (in_axis=, out_axis=) of a weight -> initialiser

# Checkpoint names of what remat policies keep of a block.
PRODUCT = "product"  # of a weight and activations
OUTPUTS = (RESIDUALS, "mlp")  # of attention and of the MLP

zeros = nn.initializers.zeros
xavier: Init = functools.partial(nn.initializers.variance_scaling, 1.0, "fan_avg", "uniform")
unit_variance: Init = functools.partial(nn.initializers.variance_scaling, 1.0, "fan_in", "normal")


def fixed(initializer: Callable[..., jax.Array]) -> Init:
    """An initialiser that does not look at which axes are inputs."""
    return lambda in_axis, out_axis: initializer


def scale_beside(module: nn.Module, weight: jax.Array) -> jax.Array | None:
    """The scale of the outputs of a module whose weight is int8 (quantization.py), else None."""
    return module.get_variable("params", "scale") if weight.dtype == jnp.int8 else None


class Einsum(nn.Module):
    """x, weight -> einsum(equation), the weight's axes named after what they are.

    The equation is a linear map: it contracts the last axes of x with the first of the weight, in
    that order ('BSNH,NHD->BSD'). It runs as one product of two matrices, because the gradient of a
    product with several contracted axes is one that XLA first transposes in memory.

    `init` is told the fans, which are read off the equation: the weight's letters that the output
    lacks are inputs, the others outputs. A bias, if any, has the output letters.

    Where the collection 'lora' holds two factors for it, 'a' (inputs, r) and 'b' (r, outputs), the
    product is x W + (x A) B (lora.py).
    """

    equation: str  # e.g. 'BSD,DNH->BSNH'
    shape: tuple[int, ...]  # of the weight
    axes: tuple[str | None, ...]  # logical names of the weight's axes
    bias: bool = False
    init: Init = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = self._contracted()
        in_axis = tuple(range(contracted))
        out_axis = tuple(range(contracted, len(self.shape)))
        init = self.init(in_axis=in_axis, out_axis=out_axis)
        init = with_axes(init, self.axes, self.dtype, contracted)
        weight = self.param("weight", init, self.shape)
        inputs, outputs = self.shape[:contracted], self.shape[contracted:]
        scale = scale_beside(self, weight)
        weight = weight if scale is not None else weight.astype(self.dtype)
        matrix = weight.reshape(math.prod(inputs), math.prod(outputs))
        rows = x.shape[: x.ndim - contracted]
        x = x.astype(self.dtype).reshape(math.prod(rows), math.prod(inputs))
        first = (0, contracted)  # of the axes that each of the matrix's two is made of
        names, sizes = ([of[i] for i in first] for of in (self.axes, self.shape))
        y = product(x, matrix, names, sizes)
        if scale is not None:
            y = (y * scale.reshape(-1)).astype(self.dtype)
        if self.has_variable("lora", "a"):
            y = y + self._low_rank(x, names, sizes)
        y = checkpoint_name(y, PRODUCT).reshape(*rows, *outputs)
        if self.bias:
            axes = tuple("norm" if axis == "embed" else axis for axis in self.axes[contracted:])
            bias = self.param("bias", with_axes(zeros, axes), outputs)
            y = y + bias.astype(self.dtype)
        return y

    def _low_rank(self, x: jax.Array, names, sizes) -> jax.Array:
        """(x A) B of rows (n, inputs): (n, outputs)."""
        a, b = (self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b"))
        rank = b.shape[0]
        into = product(x, a.reshape(-1, rank), (names[0], "rank"), (sizes[0], rank))
        into = checkpoint_name(into, PRODUCT)
        return product(into, b.reshape(rank, -1), ("rank", names[1]), (rank, sizes[1]))

    def _contracted(self) -> int:
        """How many axes are summed over. Raises ValueError where it is not a linear map."""
        operands, output = self.equation.split("->")
        x, weight = operands.split(",")
        contracted = sum(letter not in output for letter in weight)
        rows = x[: len(x) - contracted]
        if x != rows + weight[:contracted] or output != rows + weight[contracted:]:
            raise ValueError(f"{self.equation!r} does not map the last axes of x linearly.")
        return contracted


class Embed(nn.Module):
    """Token embedding, tied: `encode` looks up, `decode` gives logits."""

    vocab_size: int  # V
    width: int  # D
    dtype: Dtype = jnp.float32

    def setup(self):
        init = with_axes(nn.initializers.normal(self.width**-0.5), ("vocab", None))
        self.weight = self.param("weight", init, (self.vocab_size, self.width))

    def encode(self, ids_BT: jax.Array) -> jax.Array:
        """(B, T) int -> (B, T, D)."""
        rows_BTD = take_rows(self.weight, ids_BT)
        scale_V = scale_beside(self, self.weight)
        if scale_V is not None:
            rows_BTD = rows_BTD * jnp.take(scale_V, ids_BT)[..., None]
        return rows_BTD.astype(self.dtype)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) -> float32 logits (B, T, V)."""
        weight = self.weight.astype(self.dtype)
        y = jnp.einsum("BTD,VD->BTV", x_BTD, weight, preferred_element_type=jnp.float32)
        scale_V = scale_beside(self, self.weight)
        return y if scale_V is None else y * scale_V


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis, in float32. Returns float32.

    Gemma's has the offset 1; with 0 the weight is the factor itself. At first the factor is one.
    """

    eps: float = 1e-6
    offset: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = with_axes(nn.initializers.constant(1.0 - self.offset), ("norm",))
        weight = self.param("weight", init, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (self.offset + weight.astype(jnp.float32))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # its tanh form, as Gemma's
    "silu": jax.nn.silu,
}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): (B, S, D) -> same."""

    width: int  # D
    mlp_width: int  # F
    init: Init = xavier
    activation: str = "gelu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        if self.activation not in ACTIVATIONS:
            known = list(ACTIVATIONS)
            raise ValueError(f"Unknown activation {self.activation!r}; known: {known}.")
        into = {"shape": (self.width, self.mlp_width), "axes": ("embed", "mlp")}
        into.update(init=self.init, dtype=self.dtype)
        gate_BSF = Einsum("BSD,DF->BSF", name="gate", **into)(x_BSD)
        up_BSF = Einsum("BSD,DF->BSF", name="up", **into)(x_BSD)
        return Einsum(
            "BSF,FD->BSD",
            (self.mlp_width, self.width),
            ("mlp", "embed"),
            init=self.init,
            dtype=self.dtype,
            name="down",
        )(ACTIVATIONS[self.activation](gate_BSF) * up_BSF)


def query_projection(x_BSD, num_heads: int, head_width: int, name="q", **options) -> jax.Array:
    """(B, S, D) -> (B, S, N, H); to be called inside a compact module."""
    shape, axes = (x_BSD.shape[-1], num_heads, head_width), ("embed", "heads", "head")
    return Einsum("BSD,DNH->BSNH", shape, axes, name=name, **options)(x_BSD)


def kv_projection(x_BSD, num_kv_heads: int, head_width: int, name: str, **options) -> jax.Array:
    """(B, S, D) -> (B, S, K, H); to be called inside a compact module."""
    shape, axes = (x_BSD.shape[-1], num_kv_heads, head_width), ("embed", "kv_heads", "head")
    return Einsum("BSD,DKH->BSKH", shape, axes, name=name, **options)(x_BSD)


def output_projection(x_BSNH: jax.Array, width: int, name: str = "out", **options) -> jax.Array:
    """(B, S, N, H) -> (B, S, D); to be called inside a compact module."""
    shape, axes = (*x_BSNH.shape[-2:], width), ("heads", "head", "embed")
    return Einsum("BSNH,NHD->BSD", shape, axes, name=name, **options)(x_BSNH)


class KeyValue(nn.Module):
    """The key and value projections of one attention: (B, S, D) -> twice (B, S, K, H)."""

    num_kv_heads: int  # K
    head_width: int  # H
    init: Init = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        sizes, both = (self.num_kv_heads, self.head_width), {"init": self.init, "dtype": self.dtype}
        return kv_projection(x_BSD, *sizes, "k", **both), kv_projection(x_BSD, *sizes, "v", **both)


class QKV(nn.Module):
    """The query, key and value projections of one attention, heads split.

    (B, S, D) -> (B, S, N, H), (B, S, K, H), (B, S, K, H).
    """

    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    init: Init = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sizes, both = (self.num_kv_heads, self.head_width), {"init": self.init, "dtype": self.dtype}
        return (
            query_projection(x_BSD, self.num_heads, self.head_width, **both),
            kv_projection(x_BSD, *sizes, "k", **both),
            kv_projection(x_BSD, *sizes, "v", **both),
        )


_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "products": _policies.save_only_these_names(PRODUCT, RESIDUALS),
    "outputs": _policies.save_only_these_names(*OUTPUTS),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(OUTPUTS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _policies.nothing_saveable,
}


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block, its backward pass recomputing what the named policy does not keep.

      none      keeps everything
      products  keeps the outputs of the weight products and of attention
      outputs   keeps the outputs of attention and of the MLP, and the block's input
      offload   the same, but for the input in the host's memory
      full      keeps the block's input alone

    Raises ValueError for another name.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"Unknown remat policy {policy!r}; known: {list(REMAT_POLICIES)}.")
    if policy == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=False)


_STACKED = {"params": 0, "lora": 0}  # collections with an entry for each layer


def scan_layers(
    block: type[nn.Module], num_layers: int, in_axes, unroll: int = 1
) -> type[nn.Module]:
    """The block repeated over `num_layers` stacked layers: (carry, *inputs) -> (carry, outputs).

    `in_axes` says for every input whether it has a leading layer axis (0) or is shared
    (`nn.broadcast`). Outputs are stacked; parameters get a leading 'layers' axis. `unroll` layers
    are compiled one after the other into each turn of the loop: no change of the mathematics.
    """
    return nn.scan(
        block,
        variable_axes=_STACKED,
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=0,
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def for_each_layer(module: type[nn.Module], num_layers: int) -> type[nn.Module]:
    """The module once for every layer, all on the same input; outputs and parameters stacked."""
    return nn.vmap(
        module,
        variable_axes=_STACKED,
        split_rngs={"params": True},
        in_axes=None,
        out_axes=0,
        axis_size=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
