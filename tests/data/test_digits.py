"""The digits against scikit-learn's own arrays."""

import sys

import numpy as np
import pytest

from t2i_jax.data.digits import WORDS, Digits

datasets = pytest.importorskip("sklearn.datasets")


def test_every_scan_is_there_once_with_its_label():
    scans = datasets.load_digits()
    known = {(s * 1.0).tobytes(): t for s, t in zip(scans.images, scans.target, strict=True)}
    seen = []
    for split, size in (("train", 1500), ("validation", 297)):
        digits = Digits(8, split)
        assert len(digits) == size
        for i in range(size):
            image = digits[i]["image"]
            assert image.shape == (8, 8, 3) and image.dtype == np.uint8
            scan = np.round(image[..., 0] * (16 / 255)).tobytes()
            assert known[scan] == digits.label(i)
            seen.append(scan)
    assert len(set(seen)) == len({(s * 1.0).tobytes() for s in scans.images})


def test_captions_name_the_digit_in_several_wordings():
    digits, wordings = Digits(8), set()
    for i in range(200):
        caption, label = digits.caption(i), digits.label(i)
        named = {n for n in range(10) if str(n) in caption or WORDS[n] in caption.split()}
        named |= {n for n in range(10) if f"{WORDS[n]}," in caption}
        assert named == {label}, caption
        assert digits[i]["captions"][0] == caption and digits[i]["category"] == WORDS[label]
        wordings.add(caption.replace(str(label), "#").replace(WORDS[label], "#"))
    assert len(wordings) >= 6


def test_enlarging_is_bilinear_and_white_on_black():
    small, large = Digits(8)[3]["image"], Digits(24)[3]["image"]
    assert large.shape == (24, 24, 3)
    # In a threefold enlargement the middle pixel of each 3 x 3 lies on the original's centre.
    np.testing.assert_allclose(large[1::3, 1::3].astype(int), small.astype(int), atol=1)
    assert np.median(large) < 30 and large.max() > 200
    assert (large[..., 0] == large[..., 2]).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="train and validation"):
        Digits(8, "test")
    with pytest.raises(ValueError, match=r"data\.validation_size=1797"):
        Digits(8, "train", 1797)


def test_scikit_learn_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[digits\]'"):
        Digits()
