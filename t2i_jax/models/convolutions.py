"""Blocks of the convolutional autoencoders of the Stable Diffusion family.

Shape letters: B batch, H rows, W columns, C channels, S = H W. Weights are small and frozen: every
axis is replicated.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.attention import attend
from t2i_jax.sharding import with_axes

SAME = ((1, 1), (1, 1))  # padding of a 3 x 3 convolution: (above, below), (left, right)
AFTER = ((0, 1), (0, 1))  # of a strided one: below and right alone

_CONV_INIT = nn.initializers.lecun_normal()
_ones = nn.initializers.ones


class Conv(nn.Module):
    """Convolution with bias: (B, H, W, C) -> (B, H', W', features)."""

    features: int
    kernel: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = SAME
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x_BHWC.shape[-1], self.features)
        weight = self.param("weight", with_axes(_CONV_INIT, (None,) * 4), shape)
        bias = self.param("bias", with_axes(layers.zeros, ("norm",)), shape[-1:])
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            weight.astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y_BHWC + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalises groups of channels over all pixels, in float32, eps 1e-6. Returns float32."""

    groups: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        weight = self.param("weight", with_axes(_ones, ("norm",)), (channels,))
        bias = self.param("bias", with_axes(layers.zeros, ("norm",)), (channels,))
        grouped = (*x_BHWC.shape[:-1], self.groups, channels // self.groups)
        x = x_BHWC.astype(jnp.float32).reshape(grouped)
        x = x - jnp.mean(x, axis=(1, 2, 4), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(1, 2, 4), keepdims=True) + 1e-6)
        return x.reshape(x_BHWC.shape) * weight.astype(jnp.float32) + bias.astype(jnp.float32)


class ResNet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x projected where the channels change."""

    features: int
    groups: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h_BHWC = nn.silu(GroupNorm(self.groups, name="norm1")(x_BHWC))
        h_BHWC = Conv(self.features, dtype=self.dtype, name="conv1")(h_BHWC)
        h_BHWC = nn.silu(GroupNorm(self.groups, name="norm2")(h_BHWC))
        h_BHWC = Conv(self.features, dtype=self.dtype, name="conv2")(h_BHWC)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = pointwise(self.features, self.dtype, "shortcut")(x_BHWC)
        return x_BHWC + h_BHWC


class Attention(nn.Module):
    """x + out(attention(norm(x))) of all pixels to all pixels, one head as wide as the channels."""

    groups: int
    dtype: layers.Dtype
    kernel: str = "auto"  # of `attention.KERNELS`

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, _, _, channels = x_BHWC.shape

        def dense(name, equation):
            return layers.Einsum(
                equation, (channels, channels), (None, None), True, dtype=self.dtype, name=name
            )

        h_BSC = GroupNorm(self.groups, name="norm")(x_BHWC).reshape(batch, -1, channels)
        q, k, v = (dense(name, "BSC,CD->BSD")(h_BSC)[:, :, None] for name in "qkv")
        h_BSC = attend(q, k, v, scale=channels**-0.5, kernel=self.kernel)[:, :, 0]
        return x_BHWC + dense("out", "BSD,DC->BSC")(h_BSC).reshape(x_BHWC.shape)


def pointwise(features: int, dtype: layers.Dtype, name: str | None = None) -> Conv:
    return Conv(features, 1, 1, ((0, 0), (0, 0)), dtype, name=name)
