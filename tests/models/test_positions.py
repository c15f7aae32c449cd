"""Rotary angles written out on a small grid, and the algebra of rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import positions

HEAD, THETA = 8, 100.0
GRID = (2, 3)
CELLS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # row by row
S10 = 10**0.5


def literal(kind, n):
    """Angles (6, 4) after n tokens of text; 100^(-2i/8) is 1, 1/sqrt(10), 1/10, 1/sqrt(1000)."""
    if kind == "1d-rope":
        return [[p, p / S10, p / 10, p / (10 * S10)] for p in range(n, n + 6)]
    rows = [(n + r, n + c) for r, c in CELLS]
    if kind == "2d-rope":  # 100^(-2i/4): 1, 1/10
        return [[r, r / 10, c, c / 10] for r, c in rows]
    return [[r, r / S10, c / 10, c / (10 * S10)] for r, c in rows]  # m-rope


ROTARY = ("1d-rope", "2d-rope", "m-rope")


def test_kinds():
    assert positions.image_angles("none", GRID, jnp.array([5]), HEAD, THETA) is None
    x = vectors(0, 1, 6, 1)
    assert positions.rotate(x, None) is x


@pytest.mark.parametrize("kind", ROTARY)
def test_angles_of_a_grid(kind):
    angles = positions.image_angles(kind, GRID, jnp.array([5, 1]), HEAD, THETA)
    expected = np.array([literal(kind, 5), literal(kind, 1)])
    assert angles.shape == (2, 6, 4) and angles.dtype == jnp.float32
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_angles_of_a_text():
    angles = positions.text_angles(3, HEAD, THETA)
    expected = [[[p, p / S10, p / 10, p / (10 * S10)] for p in range(3)]]
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'3d-rope'.*1d-rope.*2d-rope.*m-rope"):
        positions.image_angles("3d-rope", GRID, jnp.array([5]), HEAD, THETA)


def vectors(seed, *shape):
    return jax.random.normal(jax.random.key(seed), (*shape, HEAD))


def test_rotation_turns_complex_numbers_of_the_two_halves():
    x = np.asarray(vectors(0, 2, 6, 3), np.float64)
    angles = positions.image_angles("2d-rope", GRID, jnp.array([5, 1]), HEAD, THETA)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.float64(angles))[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    actual = positions.rotate(jnp.float32(x), angles)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        np.linalg.norm(actual, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ROTARY)
def test_scores_of_image_tokens_do_not_depend_on_the_length_of_the_text(kind):
    q, k = vectors(1, 1, 6, 1), vectors(2, 1, 6, 1)

    def scores(length):
        angles = positions.image_angles(kind, GRID, jnp.array([length]), HEAD, THETA)
        q_, k_ = positions.rotate(q, angles), positions.rotate(k, angles)
        return jnp.einsum("binh,bjnh->ij", q_, k_)

    np.testing.assert_allclose(scores(7), scores(2), atol=1e-4)
    assert np.abs(scores(7) - jnp.einsum("binh,bjnh->ij", q, k)).max() > 0.1


def test_scores_depend_on_the_difference_of_positions_alone():
    """The first image token after n words is to the last word what word n would be."""
    q, k = vectors(3, 1, 1, 1), vectors(4, 1, 1, 1)
    text = positions.text_angles(9, HEAD, THETA)

    def score(query_angles, key_angles):
        turned = positions.rotate(q, query_angles), positions.rotate(k, key_angles)
        return float(jnp.vdot(*turned))

    image = positions.image_angles("1d-rope", GRID, jnp.array([6]), HEAD, THETA)
    assert score(image[:, :1], text[:, 5:6]) == pytest.approx(
        score(text[:, 8:9], text[:, 7:8]), abs=1e-4
    )
    assert score(image[:, 2:3], text[:, 6:7]) == pytest.approx(
        score(text[:, 2:3], text[:, :1]), abs=1e-4
    )


def test_rotation_keeps_bfloat16_but_computes_in_float32():
    x = vectors(5, 1, 1, 1).astype(jnp.bfloat16)
    far = jnp.full((1, 1, HEAD // 2), 1000.3)  # 1000.3 is 1000 in bfloat16
    turned = positions.rotate(x, far)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(turned), positions.rotate(x.astype(jnp.float32), far), atol=0.02
    )


def test_a_table_of_absolute_positions():
    """The middle 2 x 3 of a 6 x 6 table over 3.0: rows at 1.0 and 1.5, columns at 0.5, 1.0, 1.5."""
    table = positions.absolute_table(GRID, 8, 6, 3.0)
    expected = [
        [f(x * w) for x in (column, row) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
        for row in (1.0, 1.5)
        for column in (0.5, 1.0, 1.5)
    ]
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table, expected, rtol=1e-6)


@pytest.mark.parametrize(("grid", "width"), [((2, 7), 8), ((2, 3), 6)])
def test_a_table_that_does_not_fit_is_refused(grid, width):
    with pytest.raises(ValueError, match="table of 6 x 6 positions"):
        positions.absolute_table(grid, width, 6, 3.0)
