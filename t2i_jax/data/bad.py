"""Samples that cannot be trained on: what can be wrong with one.

Whoever finds the fault raises `BadSample`; the loader puts another sample in the place and tells.
"""

import enum

from t2i_jax.errors import UserError


class Cause(enum.StrEnum):
    """Why a sample is not used. The order is part of the metrics: add at the end."""

    MISSING_IMAGE = "missing_image"
    BROKEN_IMAGE = "broken_image"  # not an image of a kind that is read, or damaged
    TRUNCATED_IMAGE = "truncated_image"
    TOO_LARGE_IMAGE = "too_large_image"  # a decompression bomb, or close to one
    TINY_IMAGE = "tiny_image"
    MISSING_CAPTION = "missing_caption"
    BROKEN_CAPTION = "broken_caption"  # not UTF-8, not the JSON that was said
    EMPTY_CAPTION = "empty_caption"
    LONG_CAPTION = "long_caption"
    UNREADABLE = "unreadable"  # the file is shorter than its index says


class BadSample(UserError, ValueError):
    """A sample, or a part of one, that cannot be used. `str(error)` says what was found."""

    def __init__(self, cause: Cause, detail: str):
        super().__init__(detail)
        self.cause = cause

    def __reduce__(self):
        return type(self), (self.cause, str(self))
