"""The Inception-v3 that FID is defined by: images -> 2048 features, float32.

Szegedy et al., arXiv 1512.00567, as Heusel et al., arXiv 1706.08500, use it: the network that
TensorFlow published in 2015-12-05, up to the mean over its last 8 x 8 map. It is not the paper's,
nor torchvision's, in two places, which move every feature: the average pools inside of a block
divide by the number of pixels that are there (no padding is counted), and the last block pools
by the maximum. Modules have their published names, so that weights need no table.

Shape letters: B batch, H rows, W columns, C channels. Weights are small and frozen: every axis is
replicated. Products are taken in full float32 on every device, for features to be comparable.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.sharding import with_axes

SIZE = 299  # pixels a side
FEATURES = 2048

_EPS = 1e-3  # of the batch norms
_INIT = nn.initializers.he_normal()
_ones = nn.initializers.ones


class Conv(nn.Module):
    """relu(norm(conv(x))), the batch norm by the statistics of its training.

    Not padded where it has a stride or is `valid`; else the map keeps its size.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (*self.kernel, x_BHWC.shape[-1], self.features)
        weight = self.param("weight", with_axes(_INIT, (None,) * 4), shape)

        def channel(name, init):
            return self.param(name, with_axes(init, ("norm",)), (self.features,))

        factor = channel("norm_weight", _ones)
        factor = factor * jax.lax.rsqrt(channel("norm_variance", _ones) + _EPS)
        shift = channel("norm_bias", layers.zeros) - factor * channel("norm_mean", layers.zeros)
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC,
            weight,
            (self.stride, self.stride),
            "VALID" if self.valid or self.stride > 1 else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu(y_BHWC * factor + shift)


class BlockA(nn.Module):
    """35 x 35: 1 x 1, 5 x 5, twice 3 x 3, pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x_BHWC):
        h_BHWC = Conv(48, name="branch5x5_1")(x_BHWC)
        d_BHWC = Conv(64, name="branch3x3dbl_1")(x_BHWC)
        d_BHWC = Conv(96, (3, 3), name="branch3x3dbl_2")(d_BHWC)
        return _beside(
            Conv(64, name="branch1x1")(x_BHWC),
            Conv(64, (5, 5), name="branch5x5_2")(h_BHWC),
            Conv(96, (3, 3), name="branch3x3dbl_3")(d_BHWC),
            Conv(self.pool_features, name="branch_pool")(_average(x_BHWC)),
        )


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    @nn.compact
    def __call__(self, x_BHWC):
        d_BHWC = Conv(64, name="branch3x3dbl_1")(x_BHWC)
        d_BHWC = Conv(96, (3, 3), name="branch3x3dbl_2")(d_BHWC)
        return _beside(
            Conv(384, (3, 3), 2, name="branch3x3")(x_BHWC),
            Conv(96, (3, 3), 2, name="branch3x3dbl_3")(d_BHWC),
            _halve(x_BHWC),
        )


class BlockC(nn.Module):
    """17 x 17: 1 x 1, 7 x 7 and twice 7 x 7 in factors, pool."""

    width: int  # of what lies between the factors

    @nn.compact
    def __call__(self, x_BHWC):
        row, column, inner = (1, 7), (7, 1), self.width
        h_BHWC = Conv(inner, name="branch7x7_1")(x_BHWC)
        h_BHWC = Conv(inner, row, name="branch7x7_2")(h_BHWC)
        d_BHWC = Conv(inner, name="branch7x7dbl_1")(x_BHWC)
        for i, kernel in ((2, column), (3, row), (4, column)):
            d_BHWC = Conv(inner, kernel, name=f"branch7x7dbl_{i}")(d_BHWC)
        return _beside(
            Conv(192, name="branch1x1")(x_BHWC),
            Conv(192, column, name="branch7x7_3")(h_BHWC),
            Conv(192, row, name="branch7x7dbl_5")(d_BHWC),
            Conv(192, name="branch_pool")(_average(x_BHWC)),
        )


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    @nn.compact
    def __call__(self, x_BHWC):
        h_BHWC = Conv(192, name="branch3x3_1")(x_BHWC)
        d_BHWC = Conv(192, name="branch7x7x3_1")(x_BHWC)
        d_BHWC = Conv(192, (1, 7), name="branch7x7x3_2")(d_BHWC)
        d_BHWC = Conv(192, (7, 1), name="branch7x7x3_3")(d_BHWC)
        return _beside(
            Conv(320, (3, 3), 2, name="branch3x3_2")(h_BHWC),
            Conv(192, (3, 3), 2, name="branch7x7x3_4")(d_BHWC),
            _halve(x_BHWC),
        )


class BlockE(nn.Module):
    """8 x 8: 1 x 1, 3 x 3 and twice 3 x 3 with their last factors side by side, pool."""

    max_pool: bool

    @nn.compact
    def __call__(self, x_BHWC):
        row, column = (1, 3), (3, 1)
        h_BHWC = Conv(384, name="branch3x3_1")(x_BHWC)
        d_BHWC = Conv(448, name="branch3x3dbl_1")(x_BHWC)
        d_BHWC = Conv(384, (3, 3), name="branch3x3dbl_2")(d_BHWC)
        if self.max_pool:
            pooled_BHWC = nn.max_pool(x_BHWC, (3, 3), padding="SAME")
        else:
            pooled_BHWC = _average(x_BHWC)
        return _beside(
            Conv(320, name="branch1x1")(x_BHWC),
            Conv(384, row, name="branch3x3_2a")(h_BHWC),
            Conv(384, column, name="branch3x3_2b")(h_BHWC),
            Conv(384, row, name="branch3x3dbl_3a")(d_BHWC),
            Conv(384, column, name="branch3x3dbl_3b")(d_BHWC),
            Conv(192, name="branch_pool")(pooled_BHWC),
        )


class Inception(nn.Module):
    """(B, 299, 299, 3) in [0, 255], uint8 or float -> (B, 2048), float32."""

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        chex.assert_shape(images_BHWC, (None, SIZE, SIZE, 3))
        x_BHWC = (images_BHWC.astype(jnp.float32) - 128.0) / 128.0
        x_BHWC = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x_BHWC)
        x_BHWC = Conv(32, (3, 3), valid=True, name="Conv2d_2a_3x3")(x_BHWC)
        x_BHWC = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x_BHWC)
        x_BHWC = _halve(x_BHWC)
        x_BHWC = Conv(80, name="Conv2d_3b_1x1")(x_BHWC)
        x_BHWC = Conv(192, (3, 3), valid=True, name="Conv2d_4a_3x3")(x_BHWC)
        x_BHWC = _halve(x_BHWC)
        for name, features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x_BHWC = BlockA(features, name=f"Mixed_{name}")(x_BHWC)
        x_BHWC = BlockB(name="Mixed_6a")(x_BHWC)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x_BHWC = BlockC(width, name=f"Mixed_{name}")(x_BHWC)
        x_BHWC = BlockD(name="Mixed_7a")(x_BHWC)
        for name, max_pool in (("7b", False), ("7c", True)):
            x_BHWC = BlockE(max_pool, name=f"Mixed_{name}")(x_BHWC)
        return jnp.mean(x_BHWC, axis=(1, 2))


def _average(x_BHWC: jax.Array) -> jax.Array:
    """Of the 3 x 3 pixels around each, as far as they are there."""
    return nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=False)


def _halve(x_BHWC: jax.Array) -> jax.Array:
    return nn.max_pool(x_BHWC, (3, 3), (2, 2))


def _beside(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)
