"""Which noise levels are trained on, and which are stepped through in sampling.

Larger images need more noise to be destroyed as much, so time is shifted towards noise by

    sigma'(sigma) = shift sigma / (1 + (shift - 1) sigma)          (arXiv 2403.03206, eq. 23)

which maps [0, 1] onto itself and keeps both ends. The published system holds it in a table of
N = 1000 levels, sigma' of 1, (N-1)/N, ..., 1/N, and

    training    takes u = sigmoid(m + s n), n ~ N(0, 1), and the level of index floor(N u);
    sampling    takes `steps` levels whose unshifted sigmas are evenly spaced between the first
                and the last level of the table, shifts *those* once more, and ends at 0.

(The second shift is the published scheduler's behaviour, kept because the published images come
from it. With shift = 1 both schedules are plain.)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import ConfigError


def shift_sigma(sigma, shift: float):
    """shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shift_for(shift: float, pixels: int, trained_pixels: int) -> float:
    """The shift for images of another area than a model was trained on with `shift`."""
    return shift * math.sqrt(pixels / trained_pixels)


def training_sigmas(num_timesteps: int, shift: float) -> np.ndarray:
    """The training levels, from 1 (noise) down: float32 (num_timesteps,)."""
    sigma = np.linspace(1, num_timesteps, num_timesteps, dtype=np.float32)[::-1] / num_timesteps
    return shift_sigma(sigma, shift).astype(np.float32)


def sample_times(
    key: jax.Array, batch: int, *, num_timesteps: int, shift: float, mean: float, std: float
) -> jax.Array:
    """Logit-normal draws from the training levels: (B,) float32 in (0, 1]."""
    u = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    index = jnp.minimum(jnp.floor(num_timesteps * u).astype(jnp.int32), num_timesteps - 1)
    return jnp.asarray(training_sigmas(num_timesteps, shift))[index]


def sampling_sigmas(
    steps: int, num_timesteps: int, trained_shift: float, shift: float | None = None
) -> np.ndarray:
    """The levels of a sampler, from noise to 0: float32 (steps + 1,).

    Between the ends of the training levels, and shifted; by the training shift if not by `shift`.

    Raises ConfigError for steps outside 1..num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(f"steps = {steps}: a sampler takes 1 to {num_timesteps} steps.")
    levels = training_sigmas(num_timesteps, trained_shift)
    sigma = np.linspace(levels[0] * num_timesteps, levels[-1] * num_timesteps, steps)
    sigma = shift_sigma(sigma / num_timesteps, trained_shift if shift is None else shift)
    return np.append(sigma, 0.0).astype(np.float32)
