"""What the networks read of a picture, against the filter written out. (CLIP: tests/parity.)"""

import numpy as np
import pytest

from t2i_jax.evaluation.preprocess import for_clip, for_inception
from t2i_jax.interop.clip_model import Pictures

RNG = np.random.default_rng(0)


def bicubic(size, out):
    """(out, size): the weights of Pillow's filter, a = -1/2, as wide as the reduction."""

    def weight(x):
        x = abs(x)
        inner = (1.5 * x - 2.5) * x * x + 1
        return inner if x < 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0

    scale = size / out
    wide = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * scale
        for j in range(size):
            matrix[i, j] = weight((j + 0.5 - centre) / wide)
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(512, 512), (400, 299), (64, 333)])
def test_inception_reads_clean_fids_pixels(shape):
    """In floats, channel by channel, clipped and not rounded; extremes overshoot."""
    pixels = RNG.choice(np.array([0, 255], np.uint8), (*shape, 3))
    read = for_inception(pixels)
    assert read.shape == (299, 299, 3) and read.dtype == np.float32
    rows, columns = (bicubic(side, 299) for side in shape)
    expected = np.einsum("ih,hwc,jw->ijc", rows, np.float64(pixels), columns, optimize=True)
    assert expected.min() < -1 and expected.max() > 256
    assert np.abs(read - expected.clip(0, 255)).max() < 2e-3
    assert np.abs(read - np.round(read)).max() > 0.4


def test_a_picture_of_the_size_stays():
    pixels = RNG.integers(0, 256, (299, 299, 3), np.uint8)
    np.testing.assert_array_equal(for_inception(pixels), pixels)


def test_clip_reads_the_middle():
    """Of 5 x 8 pixels, unchanged rows 0 to 3 and columns 2 to 5."""
    pixels = RNG.integers(0, 256, (5, 8, 3), np.uint8)
    read = for_clip(pixels, Pictures(5, 4, 0.5, (1.0, 2.0, 3.0), (1.0, 1.0, 2.0)))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, (pixels[:4, 2:6] / 2 - [1, 2, 3]) / [1, 1, 2])


def test_other_arrays_are_refused():
    for array in (np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="uint8 pixels"):
            for_inception(array)
