"""Are generated digits the digits that were asked for? A linear classifier of real ones tells."""

from typing import Any

import numpy as np
from PIL import Image

from t2i_jax.data.digits import WORDS, Digits
from t2i_jax.evaluation.intervals import proportion

_SIDE = 8  # pixels a side that the classifier sees: those of the scans


def features(images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 3) -> grey 8 x 8 pixels in [0, 1], flat: (n, 64)."""

    def one(image):
        small = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        return np.asarray(small, np.float32).ravel() / 255.0

    return np.stack([one(image) for image in images])


def score(
    images: np.ndarray, labels: np.ndarray, image_size: int, validation_size: int
) -> dict[str, Any]:
    """The share of images that the classifier takes for their label, whole and by digit.

    `classifier` is the classifier's own accuracy on the real held-out digits: no model can be
    expected to score higher. Needs scikit-learn, as the digits do.
    """
    from sklearn.linear_model import LogisticRegression

    def real(split):
        source = Digits(image_size, split, validation_size)
        pixels = np.stack([source[i]["image"] for i in range(len(source))])
        return features(pixels), np.array([source.label(i) for i in range(len(source))])

    classifier = LogisticRegression(max_iter=2000).fit(*real("train"))
    right = classifier.predict(features(images)) == np.asarray(labels)
    categories = {}
    for digit, word in enumerate(WORDS):
        part = right[np.asarray(labels) == digit]
        if len(part):
            categories[word] = proportion(part)
    whole = proportion(right)
    return {
        "right": [bool(x) for x in right],
        "score": whole["fraction"],
        "interval": whole["interval"],
        "classifier": float(classifier.score(*real("validation"))),
        "categories": categories,
    }
