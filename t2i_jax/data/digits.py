"""Handwritten digits: 1,797 scans of 8 x 8 pixels that come with scikit-learn. Needs no download.

The UCI "Optical Recognition of Handwritten Digits" test set, by E. Alpaydin and C. Kaynak.
"""

import numpy as np
from PIL import Image

from t2i_jax.data.built_in import BuiltIn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}, handwritten",
    "the digit {word}",
    "a {word}, written by hand",
    "a white {word} on a black background",
    "the number {digit} in someone's handwriting",
    "handwritten digit: {word}",
)
_ORDER_SEED, _CAPTION_SEED = 8, 64  # fixed: the splits and captions are part of the data


class Digits(BuiltIn):
    """White on black RGB digits of `image_size` pixels, with captions in several wordings.

    The scans are in one fixed random order; the last `validation_size` are the validation split.
    """

    def __init__(self, image_size: int = 24, split: str = "train", validation_size: int = 297):
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ImportError(
                "data.source 'digits' needs scikit-learn, which brings the scans: "
                "pip install -e '.[digits]'"
            ) from error
        scans = datasets.load_digits()
        count = len(scans.target)
        if not 0 <= validation_size < count:
            raise ValueError(
                f"data.validation_size={validation_size}: there are {count} digits, and training "
                "needs some of them. Give less."
            )
        splits = {
            "train": slice(0, count - validation_size),
            "validation": slice(count - validation_size, count),
        }
        if split not in splits:
            raise ValueError(f"split {split!r} of the digits; there are {' and '.join(splits)}.")
        order = np.random.default_rng(_ORDER_SEED).permutation(count)[splits[split]]
        wordings = np.random.default_rng(_CAPTION_SEED).integers(len(CAPTIONS), size=count)[order]
        self._scans = np.round(scans.images[order] * (255 / 16)).astype(np.uint8)
        self._labels = scans.target[order].tolist()
        self._wordings = wordings.tolist()
        self.image_size, self.split = image_size, split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, np.ndarray | str | tuple[str, ...]]:
        """A uint8 (image_size, image_size, 3) image, its caption, and the digit's word."""
        scan = Image.fromarray(self._scans[i])
        image = np.asarray(scan.resize(self.size(i), Image.Resampling.BILINEAR))
        return {
            "image": np.repeat(image[:, :, None], 3, axis=2),
            "captions": (self.caption(i),),
            "category": WORDS[self._labels[i]],
        }

    def caption(self, i: int) -> str:
        digit = self._labels[i]
        return CAPTIONS[self._wordings[i]].format(word=WORDS[digit], digit=digit)

    def label(self, i: int) -> int:
        return self._labels[i]
