"""Handwritten digits: `python launch/train.py --config=configs/digits.py`.

The 1,797 scans that come with scikit-learn (`pip install -e '.[digits]'`), 16 x 16 pixels, "a
handwritten three". The diff to configs/scenes.py is the data, and patches of 4 pixels. After its
2800 steps the classifier of `python launch/evaluate.py --benchmark=digits` agrees with 300 prompts
of 300.
"""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """The model of the scenes on ten digits."""
    config = scenes.get_config().unlock()
    config.name = "digits"
    config.dit.update(patch_size=4, remat="none")
    config.data.update(source="digits", image_size=16, validation_size=297)
    config.sampling.update(
        prompts=tuple(
            f"a handwritten {word}"
            for word in (
                "zero",
                "one",
                "two",
                "three",
                "four",
                "five",
                "six",
                "seven",
                "eight",
                "nine",
            )
        )
    )
    return config.lock()
