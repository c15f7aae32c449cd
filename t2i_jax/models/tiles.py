"""Large images decoded in parts, so that memory is that of a part, however many there are.

Along an axis of n latent pixels, tiles of m start at 0, s, 2 s, ... with the stride s = m - o and
the overlap o = m // 4; the last one ends at the border. Over the last o latent pixels of a tile the
picture goes over, linearly, into that of the next: at output pixel y of the f o there (0 first, f
is the decoder's factor) the next tile has the weight y / (f o). That is diffusers' `tiled_decode`
with its overlap of a quarter, but that there the last tiles are cut at the border, where here the
last one is whole and overlaps more: all tiles have one shape, and one compiled decoder.

A tile is normalised by its own statistics and attends to itself alone, so the picture is close to
the one decoded at once, not equal to it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import sharding


def decode(
    decoder: Callable[[jax.Array], jax.Array], latents_BHWC: jax.Array, tile: int, factor: int
) -> jax.Array:
    """`decoder` over tiles of `tile` latent pixels a side, one image a device at a time.

    Args:
      decoder: (B, h, w, C) latents -> (B, h factor, w factor, 3) images.
      latents_BHWC: the whole latents.
      tile: side of a tile; that of the image where it is less.
      factor: output pixels a latent pixel.

    Returns:
      The images (B, H factor, W factor, 3), float32.
    """
    size = latents_BHWC.shape[1:3]
    sides = [min(tile, n) for n in size]
    rows, columns = (_places(n, m, factor) for n, m in zip(size, sides, strict=True))
    i, j = (index.ravel() for index in np.indices((len(rows[0]), len(columns[0]))))
    places = (rows[0][i], columns[0][j], rows[1][i], columns[1][j])
    groups = _groups(latents_BHWC)
    shape = (groups.shape[1], *(n * factor for n in size), 3)

    def decode_group(latents):
        def add(image, place):
            row, column, weight_H, weight_W = place
            part = jax.lax.dynamic_slice(
                latents, (0, row, column, 0), (len(latents), *sides, latents.shape[-1])
            )
            pixels = decoder(part) * weight_H[:, None, None] * weight_W[:, None]
            start = (0, row * factor, column * factor, 0)
            before = jax.lax.dynamic_slice(image, start, pixels.shape)
            return jax.lax.dynamic_update_slice(image, before + pixels, start), None

        return jax.lax.scan(add, jnp.zeros(shape, jnp.float32), places)[0]

    images = jax.lax.map(decode_group, groups)
    return images.swapaxes(0, 1).reshape(len(latents_BHWC), *shape[1:])


def _places(size: int, tile: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles start (n,), and the weights of their output pixels (n, tile * factor)."""
    overlap = tile // 4
    starts = np.array([*range(0, size - tile, tile - overlap), size - tile], np.int32)
    y = np.arange(size * factor)
    # How much of the picture comes from tile k or a later one.
    ends = (starts[:-1] + tile) * factor
    ramp = (y - ends[:, None]) / max(overlap * factor, 1) + 1
    reached = np.concatenate([np.ones((1, len(y))), np.clip(ramp, 0, 1), np.zeros((1, len(y)))])
    weights = reached[:-1] - reached[1:]
    inside = [w[s * factor : (s + tile) * factor] for w, s in zip(weights, starts, strict=True)]
    return starts, np.array(inside, np.float32)


def _groups(x_BHWC: jax.Array) -> jax.Array:
    """(B, ...) -> (B / n, n, ...): a row of each of the n devices that the batch is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    if len(x_BHWC) % shards:
        shards = 1
    return x_BHWC.reshape(shards, -1, *x_BHWC.shape[1:]).swapaxes(0, 1)
