"""From pictures to what the networks of the metrics read. Resizing moves FID: it is said exactly.

Inception: the definition of clean-fid (Parmar et al., arXiv 2104.11222). Every channel by itself
is a float32 image that Pillow resizes to 299 x 299 with its bicubic filter (a = -1/2, widened where
it reduces, so that nothing aliases), and is clipped to [0, 255]; nothing is rounded. A picture
that has this size already stays as it is.

CLIP: that of transformers' CLIPImageProcessor. The shorter side is resized, the longer one in
proportion and rounded down, by the same filter on uint8, which rounds; the central square is kept
(where there is no centre, the pixel above and to the left of it); scaled and normalised in float32.
For square pictures this is what the published code of CMMD does, too.
"""

import numpy as np
from PIL import Image

from t2i_jax.interop.clip_model import Pictures
from t2i_jax.models import inception

_BICUBIC = Image.Resampling.BICUBIC


def for_inception(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (299, 299, 3) in [0, 255]. Raises ValueError for another array."""
    _check(pixels_HWC)
    size = (inception.SIZE, inception.SIZE)

    def one(channel_HW):
        image = Image.fromarray(channel_HW.astype(np.float32))
        return np.asarray(image.resize(size, _BICUBIC))

    channels = [one(channel_HW) for channel_HW in np.moveaxis(pixels_HWC, -1, 0)]
    return np.stack(channels, axis=-1).clip(0.0, 255.0)


def for_clip(pixels_HWC: np.ndarray, pictures: Pictures) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (S, S, 3), S = pictures.crop. Raises ValueError as above."""
    _check(pixels_HWC)
    height, width = pixels_HWC.shape[:2]
    shorter = min(height, width)
    rows, columns = (int(pictures.shorter_side * side / shorter) for side in (height, width))
    image = Image.fromarray(pixels_HWC).resize((columns, rows), _BICUBIC)
    side = pictures.crop
    top, left = (rows - side) // 2, (columns - side) // 2
    x_HWC = np.asarray(image)[top : top + side, left : left + side]
    x_HWC = (x_HWC * np.float64(pictures.factor)).astype(np.float32)
    mean_C, deviation_C = np.float32(pictures.mean), np.float32(pictures.deviation)
    return (x_HWC - mean_C) / deviation_C


def _check(pixels_HWC: np.ndarray) -> None:
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        found = f"{pixels_HWC.dtype} {pixels_HWC.shape}"
        raise ValueError(f"uint8 pixels (H, W, 3) wanted, got {found}.")
