"""What is drawn, and how: the options of a pipeline, checked against its model."""

from collections.abc import Sequence
import difflib
import math
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from t2i_jax.diffusion import guidance as guiding
from t2i_jax.diffusion import solvers, time
from t2i_jax.diffusion.guidance import Guidance
from t2i_jax.errors import ConfigError


class Options(NamedTuple):
    """How images are drawn."""

    height: int  # pixels
    width: int
    start: float  # the level of noise that drawing begins at
    levels: np.ndarray  # float32 (S + 1,), of the steps that are taken: down to 0
    scale: float  # of guidance
    solver: str
    guidance: Guidance | None  # None: unguided, at scale 1

    @property
    def evaluations(self) -> int:
        """Of the network, for an image."""
        return (len(self.levels) - 1) * solvers.find(self.solver).evaluations

    @property
    def guided(self) -> int:
        """How many of the evaluations are guided."""
        if self.guidance is None:
            return 0
        low, high = self.guidance.interval
        t = self.levels[:-1]
        return int(((low < t) & (t <= high)).sum()) * solvers.find(self.solver).evaluations


def resolve(
    config: ConfigDict,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    guidance: str | Guidance | None = None,
    guidance_interval: Sequence[float] | None = None,
    shift: float | None = None,
    strength: float = 1.0,
) -> Options:
    """The options of a model; what is not given is as its `config` has it.

    Args:
      config: of the model.
      height: pixels; of the training images by default.
      width: likewise.
      steps: from pure noise; 1 to flow.num_timesteps.
      guidance_scale: 1 = conditional alone.
      solver: of `solvers.SOLVERS`.
      guidance: a method by its name, or all of its numbers, too.
      guidance_interval: noise levels (low, high) between which steps are guided.
      shift: of the noise levels towards noise; by default `time.shift_for` the size of the image.
      strength: of steps, the share that is taken: the last ones. 1 = from pure noise.

    Raises ConfigError for what cannot be drawn.
    """
    c = config.sampling
    height, width = size_of(config, height, width)
    steps, name = c.steps if steps is None else steps, c.solver if solver is None else solver
    solvers.find(name)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise ConfigError(f"steps = {steps!r}: a whole number.")
    scale = float(c.guidance if guidance_scale is None else guidance_scale)
    if not (scale >= 0 and math.isfinite(scale)):
        raise ConfigError(f"guidance_scale = {scale}: a scale is zero or more.")
    if shift is None:
        shift = time.shift_for(config.flow.shift, height * width, config.data.image_size**2)
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(f"shift = {shift}: a shift is positive.")
    if not 0 < strength <= 1:
        raise ConfigError(f"strength = {strength}: above 0 (the image as it is) and at most 1.")
    levels = time.sampling_sigmas(steps, config.flow.num_timesteps, config.flow.shift, shift)
    levels = levels[steps - max(1, round(strength * steps)) :]
    how, start = None, float(levels[0])
    if scale != 1:
        how = _guidance(config, guidance, guidance_interval)
        if how.method == "cfg-zero":
            if how.zero_steps >= len(levels) - 1:
                raise ConfigError(
                    f"zero_steps = {how.zero_steps} leaves none of {len(levels) - 1} steps."
                )
            levels = levels[how.zero_steps :]
    return Options(height, width, start, levels, scale, name, how)


def size_of(config: ConfigDict, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels. Raises ConfigError for those that cannot be drawn."""
    side, cell = config.data.image_size, config.autoencoder.downsample * config.dit.patch_size
    found = []
    for name, given in (("height", height), ("width", width)):
        length = side if given is None else given
        most = config.dit.table_size * cell
        if most and length > most:
            raise ConfigError(f"{name} = {length}: this model has positions for {most} pixels.")
        if length < cell or length % cell:
            low = max(cell, length // cell * cell)
            near = f"{low} is" if length < cell or low + cell > (most or math.inf) else ""
            raise ConfigError(
                f"{name} = {length}: sides of images are multiples of {cell} pixels, a patch of "
                f"this model; {near or f'{low} and {low + cell} are'}."
            )
        found.append(length)
    return found[0], found[1]


def guidance_of(config: ConfigDict) -> Guidance:
    """Guidance by the sampling section of `config`."""
    c = config.sampling
    return Guidance(
        method=c.guidance_method,
        interval=tuple(float(t) for t in c.guidance_interval),
        rescale=c.guidance_rescale,
        parallel=c.apg_parallel,
        norm=c.apg_norm,
        momentum=c.apg_momentum,
        zero_steps=c.zero_steps,
    )


def _guidance(
    config: ConfigDict, given: str | Guidance | None, interval: Sequence[float] | None
) -> Guidance:
    how = given if isinstance(given, Guidance) else guidance_of(config)
    if given is not None and not isinstance(given, Guidance):
        how = how._replace(method=given)
    if how.method not in guiding.METHODS:
        near = difflib.get_close_matches(str(how.method), guiding.METHODS, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(guiding.METHODS)
        raise ConfigError(f"guidance = {how.method!r} is unknown; known: {known}.{hint}")
    if interval is not None:
        how = how._replace(interval=tuple(float(t) for t in interval))
    if len(how.interval) != 2 or not 0 <= how.interval[0] < how.interval[1] <= 1:
        raise ConfigError(
            f"guidance_interval = {how.interval}: two noise levels, 0 <= low < high <= 1."
        )
    return how
