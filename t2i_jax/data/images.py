"""Encoded images to pixels: decoding, the resize and crop of the recipe, mirroring.

Every image ends as uint8 RGB of shape (H, W, 3). What cannot be decoded whole raises `BadImage`;
Pillow's LOAD_TRUNCATED_IMAGES stays off, so half an image is never taken for one.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from t2i_jax.errors import UserError

MAX_PIXELS = 1 << 26  # of an image, before and after resizing: 8192^2; more is refused undecoded

_DAMAGE = (OSError, SyntaxError, EOFError, ValueError, IndexError, TypeError, KeyError)
_DAMAGE += (struct.error, zlib.error, OverflowError, Image.DecompressionBombError)


class BadImage(UserError, ValueError):
    """Bytes that are not a whole image of a reasonable size."""


def open_image(data: bytes) -> Image.Image:
    """Decodes into an upright RGB image; transparency is laid over white. Raises BadImage."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except BadImage:
        raise
    except _DAMAGE as error:
        raise BadImage(f"{len(data)} bytes that do not decode as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit grey values (mode {image.mode!r}), whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Encoded bytes, or uint8 pixels (H, W, 3) as they are, to uint8 (H, W, 3)."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"uint8 pixels (H, W, 3) wanted, got {image.dtype} {image.shape}")
        return image
    return np.asarray(open_image(image))


def _scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side `size`; the longer is rounded down, as torchvision."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def resize_and_crop(
    image: bytes | np.ndarray,
    size: int,
    center: bool = True,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Shorter side to `size` (bilinear, antialiased), then a square crop: uint8 (size, size, 3).

    The crop is the central one (offsets rounded half to even), or uniform over all from `rng`.
    What torchvision's Resize, CenterCrop and RandomCrop do to a PIL image.
    """
    if isinstance(image, np.ndarray):
        pixels = decode(image)
        if pixels.shape[:2] == (size, size):
            return pixels
        image = Image.fromarray(pixels)
    else:
        image = open_image(image)
    width, height = _scaled(*image.size, size)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are too narrow to resize to {size}")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if center:
        left, top = round((width - size) / 2), round((height - size) / 2)
    else:
        top = int(rng.integers(height - size + 1))
        left = int(rng.integers(width - size + 1))
    return np.asarray(image.crop((left, top, left + size, top + size)))


def mirror(image: np.ndarray) -> np.ndarray:
    """Left to right."""
    return image[:, ::-1]
