"""How the time reaches the network, and with it, if asked for, a pooled embedding of the text.

The time t becomes an embedding e of the model's width, a two-layer network of sines and cosines; a
pooled text embedding, if there is one, is brought to that width by another and added to e. Then

    adaln-zero    (shift, scale, gate) of either sublayer of layer l = W_l silu(e) + b_l, zero at
                  first (Peebles and Xie, arXiv 2212.09748)
    adaln-single  the same = T_l + W silu(e) + b: one W for all layers, a table T_l for each (Chen
                  et al., arXiv 2310.00426)
    addition      x + e, once, before the first layer
    none          nothing: how noisy the latents are can be seen

and a sublayer f is x + gate * f(norm(x) (1 + scale) + shift), or x + f(norm(x)) without them. The
last norm has a shift and a scale too (FuseDiT, arXiv 2505.10046, section 4.2).

All of it is small, and computed in float32 whatever the dtype of the rest.
Shape letters: B batch, D width, E the embedding's width (= D), P pooled width.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.models import layers
from t2i_jax.sharding import with_axes

_TIME_FEATURES = 256  # width of the sinusoidal time features
_SMALL = layers.fixed(nn.initializers.normal(0.02))


def timestep_features(timestep_B: jax.Array, width: int = _TIME_FEATURES) -> jax.Array:
    """[cos, sin] of 1000 t at `width`/2 frequencies from 1 down to 1/10000; (B,) -> (B, width).

    `timestep_B` is that 1000 t.
    """
    half = width // 2
    # Constants, rounded once: at an angle of 1000 the last bit of a frequency is 1e-4 radians.
    exponent = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / half
    frequency = np.float32(np.exp(np.float64(exponent)))
    angle = timestep_B.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Embedding(nn.Module):
    """Two layers with a SiLU between them: (B, any) -> (B, D)."""

    width: int

    @nn.compact
    def __call__(self, x_BE: jax.Array) -> jax.Array:
        def linear(name, size, axes, x):
            shape = (size, self.width)
            return layers.Einsum("BE,ED->BD", shape, axes, bias=True, init=_SMALL, name=name)(x)

        x_BD = linear("hidden", x_BE.shape[-1], (None, "embed"), x_BE)
        return linear("out", self.width, ("embed", "modulation"), jax.nn.silu(x_BD))


class TimeEmbedding(nn.Module):
    """1000 t (B,) and, where the model has one, a pooled text embedding (B, P) -> e (B, D)."""

    width: int
    pooled_width: int  # P; 0: there is none
    norm_eps: float

    @nn.compact
    def __call__(self, timestep_B: jax.Array, pooled_BP: jax.Array | None) -> jax.Array:
        e_BD = Embedding(self.width, name="time")(timestep_features(timestep_B))
        if not self.pooled_width:
            return e_BD
        if pooled_BP is None or pooled_BP.shape[-1] != self.pooled_width:
            given = "none" if pooled_BP is None else f"one of {pooled_BP.shape[-1]}"
            raise ValueError(
                f"The model takes a pooled text embedding of width {self.pooled_width}, given "
                f"was {given}: pass it to encode_text."
            )
        pooled_BP = layers.RMSNorm(self.norm_eps, name="pooled_norm")(pooled_BP)
        return e_BD + Embedding(self.width, name="pooled")(pooled_BP)


class Affine(NamedTuple):
    """What the time makes of one sublayer; each (B, 1, D), float32."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


def _project(e_BD: jax.Array, count: int, init: layers.Init) -> jax.Array:
    """W silu(e) + b: (B, D) -> (B, count, D); to be called inside a compact module."""
    width = e_BD.shape[-1]
    shape, axes = (width, count, width), ("embed", "modulation", "modulation")
    linear = layers.Einsum("BE,EMD->BMD", shape, axes, bias=True, init=init, name="linear")
    return linear(jax.nn.silu(e_BD))


def _add_table(module: nn.Module, x_BMD: jax.Array) -> jax.Array:
    """x + T, T a table of the module's own: (B, count, D) -> (B, count, D)."""
    _, count, width = x_BMD.shape
    init = with_axes(nn.initializers.normal(width**-0.5), (None, "norm"))
    return x_BMD + module.param("table", init, (count, width)).astype(jnp.float32)


def _affines(x_BMD: jax.Array) -> tuple[Affine, Affine]:
    """Of attention and of the MLP, from six vectors."""
    parts = jnp.split(x_BMD, 6, axis=1)
    return Affine(*parts[:3]), Affine(*parts[3:])


class ZeroBlock(nn.Module):
    """AdaLN-Zero in a block: e (B, D) -> two Affines."""

    @nn.compact
    def __call__(self, e_BD: jax.Array) -> tuple[Affine, Affine]:
        return _affines(_project(e_BD, 6, layers.fixed(layers.zeros)))


class ZeroFinal(nn.Module):
    """AdaLN-Zero after the last norm: x (B, I, D), e (B, D) -> (B, I, D)."""

    @nn.compact
    def __call__(self, x_BID: jax.Array, e_BD: jax.Array) -> jax.Array:
        both = _project(e_BD, 2, layers.fixed(layers.zeros))
        scale, shift = jnp.split(both, 2, axis=1)
        return modulate(x_BID, shift, scale)


class SingleShared(nn.Module):
    """AdaLN-single, once for all blocks: e (B, D) -> (B, 6, D)."""

    @nn.compact
    def __call__(self, e_BD: jax.Array) -> jax.Array:
        return _project(e_BD, 6, _SMALL)


class SingleBlock(nn.Module):
    """AdaLN-single in a block: the shared (B, 6, D) -> two Affines."""

    @nn.compact
    def __call__(self, shared_BMD: jax.Array) -> tuple[Affine, Affine]:
        return _affines(_add_table(self, shared_BMD))


class SingleFinal(nn.Module):
    """AdaLN-single after the last norm: e itself, twice, and a table."""

    @nn.compact
    def __call__(self, x_BID: jax.Array, e_BD: jax.Array) -> jax.Array:
        both = _add_table(self, jnp.stack([e_BD, e_BD], axis=1))
        shift, scale = jnp.split(both, 2, axis=1)
        return modulate(x_BID, shift, scale)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """One way in which the time enters: which of the places that there are it uses."""

    embedded: bool = True  # there is an e at all
    added: bool = False  # to the tokens, before the first block
    shared: type[nn.Module] | None = None  # e -> what blocks are given; without it, e
    block: type[nn.Module] | None = None  # what blocks are given -> two Affines
    final: type[nn.Module] | None = None  # the last norm's output and e -> modulated


CONDITIONING = {
    "adaln-zero": Conditioning(block=ZeroBlock, final=ZeroFinal),
    "adaln-single": Conditioning(shared=SingleShared, block=SingleBlock, final=SingleFinal),
    "addition": Conditioning(added=True),
    "none": Conditioning(embedded=False),
}


def find(name: str) -> Conditioning:
    """The way of this name; raises ValueError naming those there are."""
    if name not in CONDITIONING:
        raise ValueError(f"Unknown conditioning {name!r}; known: {list(CONDITIONING)}.")
    return CONDITIONING[name]
