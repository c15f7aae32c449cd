"""What is handed to a pipeline, checked and in arrays. What is wrong is a ConfigError."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from t2i_jax.errors import ConfigError
from t2i_jax.options import Options


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """Its last row again, up to `size` rows."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def checked_prompts(prompts: Any, what: str = "Prompts") -> list[str]:
    """Raises ConfigError for what is no list of texts."""
    wrong = not isinstance(prompts, list | tuple) or not prompts
    if wrong or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"{what} are one or more strings, got {prompts!r:.200}.")
    for prompt in prompts:
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ConfigError(f"{prompt!r:.200} is no text: it has bytes that are not UTF-8.")
    return list(prompts)


def checked_numbers(numbers: Sequence[int] | None, n: int) -> np.ndarray:
    numbers = range(n) if numbers is None else numbers
    found = np.asarray(numbers, np.int64)
    if found.shape != (n,) or (found < 0).any() or (found >= 2**31).any():
        raise ConfigError(f"numbers must be {n}, one a prompt, from 0 to 2**31 - 1.")
    return found.astype(np.int32)


def checked_latents(latents: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if latents is None:
        return None
    latents = np.asarray(latents, np.float32)
    if latents.shape != shape or not np.isfinite(latents).all():
        raise ConfigError(f"latents must be finite, of shape {shape}, got {latents.shape}.")
    return latents


def fitted(image: Any, n: int, options: Options) -> np.ndarray | None:
    """Images to start from: uint8 (n, H, W, 3), one for all or n of them."""
    if image is None:
        return None
    several = isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4
    given = list(image) if several else [image] * n
    if len(given) != n:
        raise ConfigError(f"{len(given)} images to start from, but {n} to draw: one, or as many.")
    size = (options.width, options.height)
    found = []
    for one in given:
        if not isinstance(one, Image.Image):
            one = np.asarray(one)
            if one.dtype != np.uint8 or one.ndim != 3 or one.shape[-1] != 3:
                raise ConfigError(f"An image is uint8 (H, W, 3), got {one.dtype} {one.shape}.")
            one = Image.fromarray(one)
        fit = ImageOps.fit(one.convert("RGB"), size, Image.Resampling.BICUBIC)
        found.append(np.asarray(fit))
    return np.stack(found)


def negatives(negative_prompt: str | Sequence[str] | None, n: int) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * n
    if len(checked_prompts(negative_prompt, "Negative prompts")) != n:
        raise ConfigError(f"{len(negative_prompt)} negative prompts for {n} images: one, or {n}.")
    return list(negative_prompt)
