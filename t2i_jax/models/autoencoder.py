"""Pixels <-> latents: the KL autoencoder of the Stable Diffusion family, and the identity.

AutoencoderKL as diffusers publishes it (Rombach et al., arXiv 2112.10752, section 3.1): SD3 and
FLUX have 16 latent channels and no quant convolutions, SD1 and SDXL have 4 and both. `Autoencoder`
is what the rest of the system sees: images in [-1, 1] <-> scaled latents.

Shape letters: B batch, H rows, W columns, C channels (of pixels, features or latents), S = H W.
Weights are small (84 M parameters) and frozen: every axis is replicated.
"""

import dataclasses
import math
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t2i_jax.models import layers, tiles
from t2i_jax.models.convolutions import AFTER, Attention, Conv, GroupNorm, ResNet, pointwise

PIXEL_CHANNELS = 3


@flax.struct.dataclass
class Moments:
    """The posterior of the latents, a diagonal Gaussian.

    Attributes:
      mean: (B, H, W, C), float32.
      logvar: log of the variance, likewise; -inf where the latents are certain.
    """

    mean: jax.Array
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw (B, H, W, C), float32."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class Middle(nn.Module):
    """ResNet, attention, ResNet at the lowest resolution."""

    groups: int
    dtype: layers.Dtype
    kernel: str

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        features = x_BHWC.shape[-1]
        x_BHWC = ResNet(features, self.groups, self.dtype, name="resnet_0")(x_BHWC)
        x_BHWC = Attention(self.groups, self.dtype, self.kernel, name="attention")(x_BHWC)
        return ResNet(features, self.groups, self.dtype, name="resnet_1")(x_BHWC)


class Stage(nn.Module):
    """ResNets at one resolution, then (resize 'down' or 'up') the way to the next."""

    features: int
    num_layers: int
    resize: str | None
    groups: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x_BHWC = ResNet(self.features, self.groups, self.dtype, name=f"resnet_{i}")(x_BHWC)
        if self.resize == "down":
            conv = Conv(self.features, 3, 2, AFTER, self.dtype, name="downsample")
            return conv(x_BHWC)
        if self.resize == "up":
            return Conv(self.features, dtype=self.dtype, name="upsample")(_double(x_BHWC))
        return x_BHWC


class Encoder(nn.Module):
    """Images -> features with `out_channels` channels, 2^(stages - 1) times smaller."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: layers.Dtype
    kernel: str

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        both = {"groups": self.groups, "dtype": self.dtype}
        last = len(self.block_out_channels) - 1
        x_BHWC = Conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(x_BHWC)
        for i, features in enumerate(self.block_out_channels):
            resize = "down" if i < last else None
            stage = Stage(features, self.layers_per_block, resize, name=f"down_{i}", **both)
            x_BHWC = stage(x_BHWC)
        x_BHWC = Middle(name="mid", kernel=self.kernel, **both)(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, name="norm_out")(x_BHWC))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
    """Latents -> images, 2^(stages - 1) times larger; one more ResNet a stage than the encoder."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: layers.Dtype
    kernel: str

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        both = {"groups": self.groups, "dtype": self.dtype}
        last = len(self.block_out_channels) - 1
        x_BHWC = Conv(self.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x_BHWC)
        x_BHWC = Middle(name="mid", kernel=self.kernel, **both)(x_BHWC)
        for i, features in enumerate(reversed(self.block_out_channels)):
            resize = "up" if i < last else None
            stage = Stage(features, self.layers_per_block + 1, resize, name=f"up_{i}", **both)
            x_BHWC = stage(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, name="norm_out")(x_BHWC))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x_BHWC)


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] -> the posterior of their latents, and back; the defaults are SD3's."""

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32  # divides every entry of block_out_channels
    use_quant_conv: bool = False  # a 1 x 1 convolution on the moments
    use_post_quant_conv: bool = False  # and one on the latents
    dtype: layers.Dtype = jnp.float32  # of the computation; norms and softmax are float32
    kernel: str = "auto"  # of attention, of `attention.KERNELS`

    @property
    def downsample(self) -> int:
        """Pixels a latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        channels = self.block_out_channels
        if not channels or any(c % self.norm_groups for c in channels):
            raise ValueError(
                f"block_out_channels {channels} must be multiples of norm_groups "
                f"{self.norm_groups}."
            )
        sizes = (channels, self.layers_per_block, self.norm_groups, self.dtype, self.kernel)
        self.encoder = Encoder(2 * self.latent_channels, *sizes)
        self.decoder = Decoder(PIXEL_CHANNELS, *sizes)
        if self.use_quant_conv:
            self.quant_conv = pointwise(2 * self.latent_channels, self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = pointwise(self.latent_channels, self.dtype)

    def encode(self, images_BHWC: jax.Array) -> Moments:
        """(B, H, W, 3) in [-1, 1] -> Moments (B, H / downsample, W / downsample, C).

        Raises ValueError where `downsample` does not divide H and W.
        """
        _check("images", images_BHWC, PIXEL_CHANNELS, self.downsample)
        x_BHWC = self.encoder(images_BHWC)
        if self.use_quant_conv:
            x_BHWC = self.quant_conv(x_BHWC)
        mean_BHWC, logvar_BHWC = jnp.split(x_BHWC.astype(jnp.float32), 2, axis=-1)
        return Moments(mean_BHWC, jnp.clip(logvar_BHWC, -30.0, 20.0))

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        """Unscaled latents (B, H, W, C) -> images (B, H downsample, W downsample, 3), float32.

        The images are not clipped to [-1, 1].
        """
        _check("latents", latents_BHWC, self.latent_channels)
        x_BHWC = latents_BHWC
        if self.use_post_quant_conv:
            x_BHWC = self.post_quant_conv(x_BHWC)
        return self.decoder(x_BHWC).astype(jnp.float32)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """The reconstruction from the mean; touches every parameter."""
        return self.decode(self.encode(images_BHWC).mean)


class Identity(nn.Module):
    """The autoencoder of a model that works on pixels: no parameters, no change."""

    latent_channels: int = PIXEL_CHANNELS
    downsample: int = 1

    def encode(self, images_BHWC: jax.Array) -> Moments:
        """Images, with no variance: a sample is the image itself."""
        _check("images", images_BHWC, self.latent_channels)
        images_BHWC = images_BHWC.astype(jnp.float32)
        return Moments(images_BHWC, jnp.full_like(images_BHWC, -jnp.inf))

    def decode(self, latents_BHWC: jax.Array) -> jax.Array:
        """Latents as they are, float32."""
        _check("latents", latents_BHWC, self.latent_channels)
        return latents_BHWC.astype(jnp.float32)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        return self.decode(self.encode(images_BHWC).mean)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """What training and sampling see of either network: pure functions of its parameters.

    Latents are scaled, latent = (sample - shift) * scale, to have about unit variance. Larger ones
    than `tile` a side are decoded in tiles (tiles.py); 0: never.
    """

    net: AutoencoderKL | Identity
    scale: float = 1.0
    shift: float = 0.0
    tile: int = 0

    @property
    def downsample(self) -> int:
        """Pixels a latent pixel, along one side."""
        return self.net.downsample

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.net.latent_channels

    def init(self, key: jax.Array) -> Any:
        """Random parameters, boxed with their logical axes; {} for the identity."""
        images = jnp.zeros((1, self.downsample, self.downsample, PIXEL_CHANNELS))
        return self.net.init(key, images).get("params", {})

    def encode(self, params: Any, images_BHWC: jax.Array, key: jax.Array | None) -> jax.Array:
        """Images (B, H, W, 3) in [-1, 1] -> scaled latents (B, H', W', C), float32.

        A draw from the posterior by `key`; its mean where `key` is None.
        """
        moments = self.posterior(params, images_BHWC)
        return self.scaled(moments.mean if key is None else moments.sample(key))

    def posterior(self, params: Any, images_BHWC: jax.Array) -> Moments:
        """Images (B, H, W, 3) in [-1, 1] -> what `encode` draws from, not scaled."""
        return self.net.apply({"params": params}, images_BHWC, method="encode")

    def scaled(self, sample_BHWC: jax.Array) -> jax.Array:
        """Draws from the posterior -> latents."""
        return (sample_BHWC - self.shift) * self.scale

    def decode(self, params: Any, latents_BHWC: jax.Array, tile: int | None = None) -> jax.Array:
        """Scaled latents (B, H', W', C) -> images (B, H, W, 3), float32, about [-1, 1].

        In tiles of `tile`, by default the autoencoder's own; 0 and what covers the image: at once.
        """
        sample_BHWC = latents_BHWC.astype(jnp.float32) / self.scale + self.shift
        tile = self.tile if tile is None else tile

        def decoder(x_BHWC):
            return self.net.apply({"params": params}, x_BHWC, method="decode")

        if not tile or tile >= max(sample_BHWC.shape[1:3]):
            return decoder(sample_BHWC)
        return tiles.decode(decoder, sample_BHWC, tile, self.downsample)


def make(
    kind: str,
    channels: int,
    downsample: int,
    scale: float,
    shift: float,
    tile: int = 0,
    *,
    net: AutoencoderKL | None = None,
    dtype: layers.Dtype = jnp.float32,
    kernel: str = "auto",
    **architecture: Any,
) -> Autoencoder:
    """The autoencoder of a config's section, `make(**config.autoencoder)`.

    `net` is one whose weights were loaded; without it, 'kl' is AutoencoderKL with `architecture`
    (its fields) and the defaults of SD3. Raises ValueError for an unknown kind, and where the
    network has not these `channels` or this `downsample`, or `scale` is not a positive number.
    """
    kinds = ("kl", "identity")
    if kind not in kinds:
        raise ValueError(f"Unknown autoencoder.kind {kind!r}; known: {list(kinds)}.")
    if kind == "identity" and (architecture or net is not None):
        raise ValueError("autoencoder.kind 'identity' has no network and no architecture.")
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(shift)):
        raise ValueError(f"autoencoder.scale {scale} must be positive, its shift {shift} finite.")
    if kind == "identity":
        net = Identity()
    elif net is None:
        net = AutoencoderKL(latent_channels=channels, dtype=dtype, kernel=kernel, **architecture)
    for name, given, actual in (
        ("channels", channels, net.latent_channels),
        ("downsample", downsample, net.downsample),
    ):
        if given != actual:
            raise ValueError(f"autoencoder.{name} is {given}, but its network has {actual}.")
    return Autoencoder(net, scale, shift, tile)


def _double(x_BHWC: jax.Array) -> jax.Array:
    """Nearest neighbour, 2 x 2 pixels for one."""
    batch, rows, columns, channels = x_BHWC.shape
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
    return x.reshape(batch, 2 * rows, 2 * columns, channels)


def _check(what: str, x_BHWC: jax.Array, channels: int, multiple: int = 1) -> None:
    chex.assert_rank(x_BHWC, 4)
    if x_BHWC.shape[-1] != channels:
        raise ValueError(f"{what} {x_BHWC.shape} must be (B, H, W, C) with C = {channels}.")
    if x_BHWC.shape[1] % multiple or x_BHWC.shape[2] % multiple:
        raise ValueError(f"{what} {x_BHWC.shape}: H and W must be multiples of {multiple}.")
