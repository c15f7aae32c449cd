"""Encoded images to pixels: decoding, the resize and crop of the recipe, mirroring.

Every image ends as uint8 RGB of shape (H, W, 3). What cannot be decoded whole is a `BadSample`.
JPEGs are decoded by simplejpeg: the same pixels as Pillow's, in two thirds of the time, and where
libjpeg warns of damage (a tail of zeros, say) it refuses, where Pillow would hand out what there
is. docs/data.md has the measurements. All else, and all resizing, is Pillow's.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError
import simplejpeg

from t2i_jax.data.bad import BadSample, Cause

FORMATS = ("JPEG", "PNG", "WEBP")  # nothing else is ever decoded
MAX_PIXELS = 1 << 26  # of an image, before and after resizing: 8192^2; more is refused undecoded
_MAX_WORK = 1 << 32  # pixels times scans of a JPEG, some seconds; progressive ones have ten scans

_DAMAGE = (OSError, SyntaxError, EOFError, ValueError, IndexError, TypeError, KeyError)
_DAMAGE += (struct.error, zlib.error, OverflowError, Image.DecompressionBombError)
_CUT = ("truncated", "premature end", "not enough image data")  # how the libraries call it
_ORIENTATION = 0x0112  # Exif's tag
_TURNS = {  # its values: what makes the stored pixels upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
_TURNED = (5, 6, 7, 8)  # those that swap width and height


def _open(data: bytes) -> Image.Image:
    """What the header says; no pixel is decoded. Raises BadSample."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _DAMAGE as error:
        raise _bad(data, error) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise BadSample(Cause.TOO_LARGE_IMAGE, f"{size}; at most {MAX_PIXELS} are read")
    return image


def _bad(data: bytes, error: Exception | str) -> BadSample:
    if isinstance(error, Image.DecompressionBombError):
        return BadSample(Cause.TOO_LARGE_IMAGE, str(error))
    if isinstance(error, UnidentifiedImageError):  # whose text has an address in memory
        error = f"no {', '.join(FORMATS)}"
    cut = any(word in str(error).lower() for word in _CUT)
    cause = Cause.TRUNCATED_IMAGE if cut else Cause.BROKEN_IMAGE
    return BadSample(cause, f"{len(data)} bytes that do not decode as an image: {error}")


def _orientation(image: Image.Image) -> int:
    """Exif's: 1 is upright."""
    return image.getexif().get(_ORIENTATION, 1)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from the header alone. Raises BadSample.

    `data` may be the beginning of a file.
    """
    image = _open(data)
    try:
        turned = _orientation(image) in _TURNED
    except _DAMAGE as error:
        raise _bad(data, error) from error
    return image.size[::-1] if turned else image.size


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Encoded bytes, or uint8 pixels (H, W, 3) as they are, to uint8 (H, W, 3), upright.

    Transparency is laid over white. Raises BadSample.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"uint8 pixels (H, W, 3) wanted, got {image.dtype} {image.shape}")
        return image
    if _is_plain_jpeg(image):
        return _decode_plain_jpeg(image)
    opened = _open(image)
    try:
        if opened.format in ("JPEG", "MPO"):  # MPO: with further pictures behind the first
            pixels = _decode_jpeg(image, opened)
        else:
            if opened.format == "PNG":
                _check_png(image)
            opened.load()
            pixels = np.asarray(_to_rgb(opened))
        return _TURNS.get(_orientation(opened), lambda pixels: pixels)(pixels)
    except BadSample:
        raise
    except _DAMAGE as error:
        raise _bad(image, error) from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether nothing but the pixels is to be read of a JPEG: no Exif or XMP turns it (APP1)."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) > at + 4:
        marker = data[at + 1]
        if marker in (0xE1, 0xDA):
            return marker == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _decode_plain_jpeg(data: bytes) -> np.ndarray:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("YCbCr", "RGB", "Gray"):
            _check_work(data, width, height)
            return simplejpeg.decode_jpeg(data, "RGB")
        return _decode_jpeg(data, _open(data))
    except BadSample:
        raise
    except _DAMAGE as error:
        raise _bad(data, error) from error


def _check_work(data: bytes, width: int, height: int) -> None:
    """Raises BadSample for too many pixels, or scans: an empty one costs as much as a full one."""
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels"
        raise BadSample(Cause.TOO_LARGE_IMAGE, f"{size}; at most {MAX_PIXELS} are read")
    if data.count(b"\xda") * width * height <= _MAX_WORK:  # no fewer, and quickly counted
        return
    scans = data.count(b"\xff\xda")
    if scans * width * height > _MAX_WORK:
        raise BadSample(Cause.TOO_LARGE_IMAGE, f"{scans} scans of {width} x {height} pixels")


def _decode_jpeg(data: bytes, header: Image.Image) -> np.ndarray:
    """The pixels as stored, not turned upright."""
    _check_work(data, *header.size)
    if simplejpeg.decode_jpeg_header(data)[:2] != header.size[::-1]:
        raise ValueError("its headers disagree about its size")
    if header.mode in ("RGB", "L"):
        return simplejpeg.decode_jpeg(data, "RGB")
    simplejpeg.decode_jpeg(data, "CMYK")  # raises where there is damage, which Pillow passes over
    return np.asarray(_to_rgb(header))


def _check_png(data: bytes) -> None:
    """Raises ValueError where the pixels are damaged: Pillow does not look at their checksums."""
    at, kind = 8, b"IHDR"
    while kind.isalpha() and kind != b"IEND" and at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + size
        if end + 4 > len(data):
            raise ValueError("truncated inside of a chunk")
        checksum = zlib.crc32(memoryview(data)[at + 4 : end]) if kind == b"IDAT" else None
        if checksum not in (None, int.from_bytes(data[end : end + 4], "big")):
            raise ValueError("a checksum of its pixels does not match")
        at = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey values (mode {image.mode!r}), whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def open_image(data: bytes) -> Image.Image:
    """`decode` as an image of Pillow."""
    return Image.fromarray(decode(data))


def _scaled(width: int, height: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that just covers `shape`, (height, width); rounded down, as torchvision."""
    if shape[1] * height >= shape[0] * width:  # as wide as the shape, and higher
        return shape[1], max(shape[0], int(shape[1] * height / width))
    return max(shape[1], int(shape[0] * width / height)), shape[0]


def resize_and_crop(
    image: bytes | np.ndarray,
    size: int | tuple[int, int],
    center: bool = True,
    rng: np.random.Generator | None = None,
    least: int = 1,
) -> np.ndarray:
    """Shorter side to `size` (bilinear, antialiased), then a square crop: uint8 (size, size, 3).

    With a shape (height, width): scaled until it just covers it, then cropped. The crop is the
    central one (offsets rounded half to even), or uniform over all from `rng`. What torchvision's
    Resize, CenterCrop and RandomCrop do to a PIL image. Raises BadSample, also where the shorter
    side of an encoded image has less than `least` pixels.
    """
    shape = (size, size) if isinstance(size, int) else size
    pixels = decode(image)
    height, width = pixels.shape[:2]
    if min(height, width) < least and not isinstance(image, np.ndarray):
        raise BadSample(Cause.TINY_IMAGE, f"{width} x {height} pixels; {least} a side are wanted")
    scaled = _scaled(width, height, shape)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        narrow = f"{width} x {height} pixels are too narrow to resize to {shape[1]} x {shape[0]}"
        raise BadSample(Cause.TOO_LARGE_IMAGE, narrow)
    if scaled != (width, height):
        resized = Image.fromarray(pixels).resize(scaled, Image.Resampling.BILINEAR)
        pixels = np.asarray(resized)
    rows, columns = pixels.shape[0] - shape[0], pixels.shape[1] - shape[1]
    if center:
        left, top = round(columns / 2), round(rows / 2)
    else:
        top, left = int(rng.integers(rows + 1)), int(rng.integers(columns + 1))
    return pixels[top : top + shape[0], left : left + shape[1]]


def mirror(image: np.ndarray) -> np.ndarray:
    """Left to right."""
    return image[:, ::-1]
