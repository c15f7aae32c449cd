"""Positions of text and image tokens: rotary ones, and a table of absolute ones.

RoPE (Su et al., arXiv 2104.09864) turns the pair (x_i, x_{i + H/2}) of a head by the angle
position * theta^(-2i / H), so that a query and a key see the difference of their positions. An
image token at (row, column) has two positions; both are offset by the number n of real text
tokens, so that the image goes on where the text ends (Gemma's own keys keep positions 0..n-1):

    1d-rope   one position, n + row * width + column
    2d-rope   H/4 frequencies of a head of width H/2 turn by n + row, the same H/4 by n + column
    m-rope    the H/4 high frequencies of the full head turn by n + row, the H/4 low by n + column
    none      image tokens are not turned

Where text keys carry no positions (cross attention, learned projections) n is 0.
(FuseDiT, arXiv 2505.10046, section 4.3.) Angles are (B, I, H/2) in radians, float32.

Differences alone do not tell an image token where it is: the text that it could measure from has
another length in every prompt. A table of sines and cosines of its row and column, added to the
patch, does (Peebles and Xie, arXiv 2212.09748). The published 'APE' is that table and no rotation.
"""

import jax
import jax.numpy as jnp

IMAGE_POSITIONS = ("1d-rope", "2d-rope", "m-rope", "none")


def frequencies(head_width: int, theta: float) -> jax.Array:
    """theta^(-2i / H) for i < H/2, float32."""
    return theta ** -(jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)


def text_angles(length: int, head_width: int, theta: float) -> jax.Array:
    """Angles (1, T, H/2) of the positions 0..T-1."""
    positions_T = jnp.arange(length, dtype=jnp.float32)
    return (positions_T[:, None] * frequencies(head_width, theta))[None]


def image_angles(
    kind: str, grid: tuple[int, int], start_B: jax.Array, head_width: int, theta: float
) -> jax.Array | None:
    """Angles (B, rows * columns, H/2) of a grid of image tokens whose first is at `start_B`.

    None where the kind is 'none'. Raises ValueError for an unknown kind.
    """
    if kind == "none":
        return None
    rows, columns = grid
    row_I = jnp.repeat(jnp.arange(rows), columns).astype(jnp.float32)
    column_I = jnp.tile(jnp.arange(columns), rows).astype(jnp.float32)
    n_B1 = start_B.astype(jnp.float32)[:, None]
    if kind == "1d-rope":
        position_BI = n_B1 + row_I * columns + column_I
        return position_BI[..., None] * frequencies(head_width, theta)
    row_BI1, column_BI1 = (n_B1 + row_I)[..., None], (n_B1 + column_I)[..., None]
    if kind == "2d-rope":
        frequency = frequencies(head_width // 2, theta)
        return jnp.concatenate([row_BI1 * frequency, column_BI1 * frequency], axis=-1)
    if kind == "m-rope":
        high, low = jnp.split(frequencies(head_width, theta), 2)
        return jnp.concatenate([row_BI1 * high, column_BI1 * low], axis=-1)
    raise ValueError(f"Unknown image positions {kind!r}; known: {list(IMAGE_POSITIONS)}.")


def absolute_table(grid: tuple[int, int], width: int, side: int, extent: float) -> jax.Array:
    """The middle of a `side` x `side` table of positions: (rows * columns, D), float32.

    Row and column run from 0 to `extent` over the table. A quarter of the width each is the sine
    and the cosine of the column at D/4 frequencies from 1 down to 1/10000, then those of the row.
    Raises ValueError where the grid is larger than the table or 4 does not divide the width.
    """
    if max(grid) > side or width % 4:
        raise ValueError(
            f"A table of {side} x {side} positions of width {width} does not fit {grid[0]} x "
            f"{grid[1]} image tokens: raise dit.table_size; 4 must divide dit.width."
        )
    frequency = 10_000.0 ** -(jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    row_R, column_C = ((jnp.arange(n) + (side - n) // 2) * (extent / side) for n in grid)
    row_I, column_I = jnp.repeat(row_R, grid[1]), jnp.tile(column_C, grid[0])
    angles = (column_I[:, None] * frequency, row_I[:, None] * frequency)
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


def rotate(x_BSNH: jax.Array, angles_BSH: jax.Array | None) -> jax.Array:
    """Turns queries or keys (B, S, N, H) by angles (B or 1, S, H/2), in float32; dtype kept."""
    if angles_BSH is None:
        return x_BSNH
    cos, sin = jnp.cos(angles_BSH)[:, :, None], jnp.sin(angles_BSH)[:, :, None]
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNH.dtype)
