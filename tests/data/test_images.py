"""Decoding, resizing and cropping against closed forms and literal pixels."""

import io

import numpy as np
from PIL import Image, ImageFile, ImageOps
import pytest

from t2i_jax.data import images
from t2i_jax.data.bad import BadSample, Cause


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_rgb_and_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(pixels))), pixels)
    grey = images.decode(encode(Image.fromarray(pixels[..., 0])))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, axis=2))


def test_sixteen_bit_grey_keeps_its_high_byte():
    levels = np.array([[0, 0x1234, 0xFFFF]], np.uint16)
    image = images.decode(encode(Image.fromarray(levels)))
    assert image[0, :, 0].tolist() == [0, 0x12, 0xFF]


def test_transparency_is_laid_over_white():
    rgba = Image.fromarray(
        np.array([[[200, 0, 0, 0], [200, 0, 0, 51], [200, 0, 0, 255]]], np.uint8), "RGBA"
    )
    # alpha c + (1 - alpha) 255 with alpha = 0, 0.2, 1
    expected = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    assert images.decode(encode(rgba))[0].tolist() == expected
    grey = Image.fromarray(np.array([[[100, 0], [100, 51], [100, 255]]], np.uint8), "LA")
    assert images.decode(encode(grey))[0, :, 0].tolist() == [255, 224, 100]


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert images.decode(encode(palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    data = encode(palette, transparency=1)
    assert images.decode(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    pixels = images.decode(encode(image, "JPEG", quality=100)).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "JPEG", "WEBP"):
        data = encode(Image.fromarray(pixels), format, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(images.decode(data) > 127, expected > 127)
        assert images.upright_size(data) == expected.shape[1::-1]
        assert expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


def test_a_jpeg_has_the_pixels_that_pillow_reads():
    ramp = np.add.outer(np.arange(37), np.arange(53)) * 2
    pixels = np.stack([ramp, 255 - ramp, ramp // 2], -1).astype(np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
        for options in ({}, {"progressive": True}, {"quality": 30}):
            data = encode(image, "JPEG", **options)
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(images.decode(data), expected)


def test_damaged_images_are_refused():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "WEBP"):
        data = encode(noise, format)
        for size in (0, 10, len(data) // 2, len(data) - 200):
            with pytest.raises(BadSample):
                images.decode(data[:size])
    with pytest.raises(BadSample, match="do not decode"):
        images.decode(b"<html>404</html>")
    for format in ("GIF", "BMP", "TIFF"):  # read by Pillow, not by us
        with pytest.raises(BadSample, match="do not decode"):
            images.decode(encode(noise, format))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_jpeg_whose_tail_is_lost_is_refused():
    """Pillow hands out what there is of the second, the rest grey."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    half = len(data) // 2
    for damaged in (data[:half], data[:half] + bytes(half), data[:half] + data[-2:]):
        with pytest.raises(BadSample):
            images.decode(damaged)
    with pytest.raises(BadSample) as error:
        images.decode(data[:half])
    assert error.value.cause == Cause.TRUNCATED_IMAGE


def test_bombs_are_refused_before_decoding():
    bomb = encode(Image.new("1", (8192, 8193)), compress_level=9)
    assert len(bomb) < 20_000
    with pytest.raises(BadSample, match="8192 x 8193 pixels"):
        images.decode(bomb)
    with pytest.raises(BadSample, match="too narrow"):
        images.resize_and_crop(np.zeros((1, 20_000, 3), np.uint8), 64)


def test_arrays_pass_through_and_are_checked():
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert images.decode(pixels) is pixels
    assert np.shares_memory(images.resize_and_crop(pixels, 4), pixels)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8 pixels"):
            images.decode(wrong)


def columns(width, height, step=1):
    ramp = np.arange(width, dtype=np.uint8) * step
    return np.repeat(np.tile(ramp, (height, 1))[:, :, None], 3, axis=2)


@pytest.mark.parametrize("width, first", [(8, 0), (9, 0), (11, 2), (13, 2), (15, 4), (12, 2)])
def test_centre_crop_rounds_half_to_even(width, first):
    """round((width - 8) / 2): torchvision's CenterCrop."""
    image = columns(width, 8)
    assert images.resize_and_crop(image, 8)[0, :, 0].tolist() == list(range(first, first + 8))
    turned = image.transpose(1, 0, 2)
    cropped = images.resize_and_crop(np.ascontiguousarray(turned), 8)
    assert cropped[:, 0, 0].tolist() == list(range(first, first + 8))


def test_random_crops_are_uniform_over_all_places():
    image = columns(12, 8)
    rng = np.random.default_rng(0)
    firsts = [images.resize_and_crop(image, 8, False, rng)[0, 0, 0] for _ in range(1000)]
    counts = np.bincount(firsts)
    assert len(counts) == 5 and counts.min() > 150  # 200 expected, standard deviation 13


def test_resizing_a_ramp_gives_a_ramp():
    """Bilinear with antialias keeps linear functions: out(i) = in(4 (i + 1/2) - 1/2)."""
    small = images.resize_and_crop(columns(80, 80, 3), 20)[0, :, 0].astype(float)
    expected = 3 * (4 * (np.arange(20) + 0.5) - 0.5)
    np.testing.assert_allclose(small[1:-1], expected[1:-1], atol=1)


def test_shrinking_averages():
    """Stripes of one pixel vanish into grey; without antialias they would stay black or white."""
    stripes = columns(64, 64) % 2 * 255
    shrunk = images.resize_and_crop(stripes, 8).astype(int)
    assert np.abs(shrunk[:, 1:-1] - 127.5).max() <= 2


def test_the_longer_side_is_rounded_down():
    """100 x 30 to 20: 66 x 20 (66.67), then columns 23 to 43."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 100, 3), dtype=np.uint8)
    resized = Image.fromarray(pixels).resize((66, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[:, 23:43]
    np.testing.assert_array_equal(images.resize_and_crop(pixels, 20), expected)
    data = encode(Image.fromarray(pixels))
    np.testing.assert_array_equal(images.resize_and_crop(data, 20), expected)


def test_shapes_are_covered_then_cropped():
    """24 x 16 pixels (w x h) to (20, 40) are resized to 40 x 26; to (20, 12), to 30 x 20."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    for shape, resized, at in (((20, 40), (40, 26), (3, 0)), ((20, 12), (30, 20), (0, 9))):
        whole = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR))
        expected = whole[at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]]
        np.testing.assert_array_equal(images.resize_and_crop(pixels, shape), expected)


def test_tiny_images():
    data = encode(Image.new("RGB", (40, 7)))
    assert images.resize_and_crop(data, 8, least=7).shape == (8, 8, 3)
    with pytest.raises(BadSample, match="40 x 7 pixels; 8 a side") as error:
        images.resize_and_crop(data, 8, least=8)
    assert error.value.cause == Cause.TINY_IMAGE


def test_mirror():
    assert images.mirror(columns(3, 1))[0, :, 0].tolist() == [2, 1, 0]
