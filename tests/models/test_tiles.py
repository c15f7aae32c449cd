"""Decoding in tiles: where they are, how they are blended, and what that costs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from t2i_jax import build, sharding
from t2i_jax.models import autoencoder, tiles

FACTOR = 2


class Point(nn.Module):
    """A decoder that sees one latent pixel: 2 channels -> 2 x 2 pixels that differ."""

    latent_channels: int = 2
    downsample: int = FACTOR

    def decode(self, x_BHWC):
        pixels = jnp.tanh(x_BHWC @ jnp.arange(1.0, 7.0).reshape(2, 3))
        corner = jnp.arange(4.0).reshape(2, 1, 2, 1)
        x = pixels[:, :, None, :, None] + corner
        batch, rows, _, columns, _, _ = x.shape
        return x.reshape(batch, rows * FACTOR, columns * FACTOR, 3)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def test_places_are_diffusers_but_for_the_last():
    """8 of 20 latent pixels, overlap 2: stride 6, and the last tile at the border."""
    starts, weights = tiles._places(20, 8, FACTOR)
    assert starts.tolist() == [0, 6, 12]
    up, down = np.arange(4) / 4, 1 - np.arange(4) / 4
    np.testing.assert_allclose(weights[0], [*np.ones(12), *down])
    np.testing.assert_allclose(weights[1], [*up, *np.ones(8), *down])
    np.testing.assert_allclose(weights[2], [*up, *np.ones(12)])
    starts, weights = tiles._places(17, 8, FACTOR)
    assert starts.tolist() == [0, 6, 9]
    np.testing.assert_allclose(weights[2], [*np.zeros(6), *up, *np.ones(6)])
    starts, weights = tiles._places(8, 8, FACTOR)
    assert starts.tolist() == [0] and (weights == 1).all()


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("size", [13, 14, 29, 64])
def test_weights_sum_to_one(size, tile):
    starts, weights = tiles._places(size, tile, FACTOR)
    total = np.zeros(size * FACTOR)
    for start, weight in zip(starts, weights, strict=True):
        assert 0 <= start <= size - tile
        total[start * FACTOR : (start + tile) * FACTOR] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() >= 0


@pytest.mark.parametrize("shape", [(3, 19, 11), (2, 6, 30), (1, 9, 9)])
def test_a_decoder_of_points_gives_the_same_picture(shape):
    ae = autoencoder.Autoencoder(Point(), scale=2.0, shift=0.5, tile=8)
    latents = random(*shape, 2)
    whole, parts = (jax.jit(ae.decode, static_argnums=2)({}, latents, tile) for tile in (0, None))
    assert whole.shape == (shape[0], 2 * shape[1], 2 * shape[2], 3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_config_says_how_large_tiles_are():
    config = base.get_config().unlock()
    assert build.make_autoencoder(config).tile == 0
    config.autoencoder.tile = 32
    assert build.make_autoencoder(config).tile == 32


def test_rows_keep_their_places_on_many_devices():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    ae = autoencoder.Autoencoder(Point(), tile=4)
    latents = random(16, 6, 7, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(latents, sharding.batch_sharding(mesh))
        parts = jax.jit(ae.decode)({}, placed)
    np.testing.assert_allclose(parts, ae.decode({}, latents, 0), atol=1e-5)


@pytest.fixture(scope="module")
def kl():
    """A random AutoencoderKL with a kind of weights that keeps the size of what goes through."""
    net = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}
    ae = autoencoder.make("kl", 2, FACTOR, 1.5, 0.25, **net)
    return ae, nn.meta.unbox(ae.init(jax.random.key(0)))


def test_tiles_that_cover_the_image_are_the_plain_decode(kl):
    ae, params = kl
    latents = random(2, 12, 9, 2)
    decode = jax.jit(ae.decode, static_argnums=2)
    for tile in (12, 64):
        np.testing.assert_array_equal(decode(params, latents, tile), decode(params, latents, None))
    assert np.abs(decode(params, latents, 8) - decode(params, latents, 0)).max() > 1e-3


def test_the_picture_is_close_to_the_one_decoded_at_once(kl):
    ae, params = kl
    decode = jax.jit(ae.decode, static_argnums=2)

    latents = random(1, 48, 48, 2)
    whole = np.asarray(decode(params, latents, 0))

    def error(tile):
        """In standard deviations of the picture, away from its border."""
        difference = np.asarray(decode(params, latents, tile)) - whole
        return np.sqrt(np.square(difference[:, 8:-8, 8:-8]).mean()) / whole.std()

    # Noise is the hardest of pictures: tiles of it differ in mean and variance by chance alone.
    assert error(32) < 0.15 and error(32) < error(16) / 2


def test_memory_does_not_grow_with_the_number_of_tiles(kl):
    """Of what is needed beside the image and its latents."""
    ae, params = kl

    def scratch(side, tile):
        latents = jax.ShapeDtypeStruct((2, side, side, 2), jnp.float32)
        compiled = jax.jit(ae.decode, static_argnums=2).lower(params, latents, tile).compile()
        analysis = compiled.memory_analysis()
        return analysis.temp_size_in_bytes - analysis.output_size_in_bytes

    few, many, whole = scratch(24, 16), scratch(96, 16), scratch(96, 0)
    assert many < 1.5 * few and many < whole / 8
