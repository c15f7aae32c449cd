"""From prompts to images.

    pipeline = Pipeline.load("runs/scenes")
    images = pipeline(["a red ring above a blue square"], seed=0)

The text memory of a prompt is made once for all steps, that of the empty prompt once a batch.
Image i of a seed starts from noise that depends on (seed, i) alone, so it is the same picture in
any batch and on any number of devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from t2i_jax import build, checkpoint, convert, frozen, sampler, sharding
from t2i_jax.data.prompts import Prompts
from t2i_jax.diffusion import time
from t2i_jax.errors import ConfigError, users_files
from t2i_jax.interop.mapping import materialise
from t2i_jax.interop.stored import Stored
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.models.fusion import TextToImageModel


class Pipeline(NamedTuple):
    """A model with its weights, tokenizers and autoencoder, ready to draw.

    Weights that the network casts before it uses them are held in the dtype that it casts them to:
    the same images, in half the memory where the model computes in bfloat16.
    """

    config: ConfigDict
    autoencoder: Autoencoder
    prompts: Prompts
    params: Any  # trained
    frozen: Any  # {'llm', 'autoencoder'}, and 'clip' where the model uses it
    mesh: Mesh

    @classmethod
    def load(cls, path: epath.PathLike, *, weights: str = "ema") -> "Pipeline":
        """The pipeline of a checkpoint, or of a whole model in any format that convert.py reads.

        A checkpoint is named by its working directory (the newest one) or its own; of it `weights`
        is 'ema' (the average) or 'params' (as trained). Raises UserError where there is none,
        saying what is there.
        """
        if convert.is_converted(path):
            return cls._of(convert.open_model(path, averaged=weights == "ema"))
        workdir, step = checkpoint.find(path)
        with checkpoint.Checkpoints(workdir) as saved:
            config = saved.config(step)
            if config.lora.rank:
                return cls._of(convert.open_model(path, averaged=weights == "ema"))
            mesh = _mesh_here(config)
            master = sampler.abstract_params(config, mesh, master=True)
            # First, while there is room: the masters are twice as large as what is held.
            params = as_held(saved.weights(step, weights, master), config, mesh)
            prompts, autoencoder, frozen_params = frozen.load(config, workdir, mesh)
        return cls(config, autoencoder, prompts, params, frozen_params, mesh)

    @classmethod
    def _of(cls, stored: Stored) -> "Pipeline":
        config, mesh = stored.config, _mesh_here(stored.config)
        params = trained_params(stored, config, sampler.abstract_params(config, mesh))
        prompts = frozen.make_prompts(config, stored.tokenizer, stored.clip_tokenizer)
        autoencoder, frozen_params = frozen.place(config, mesh, stored.weights, stored.autoencoder)
        return cls(config, autoencoder, prompts, params, frozen_params, mesh)

    @property
    def model(self) -> TextToImageModel:
        """The networks that `params` and `frozen` are of."""
        return build.model(self.config)

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> list[Image.Image]:
        """Images of one or several prompts; options as of `draw`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return [Image.fromarray(image) for image in self.draw(prompts, **options)]

    def draw(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Any = None,
    ) -> np.ndarray:
        """One image a prompt: uint8 (n, H, W, 3).

        `steps`, `guidance` and `batch_size` default to the config's sampling section. `progress`,
        if given, is called with the number of images drawn so far. Raises ValueError for no
        prompts, and for steps out of range.
        """
        if not prompts:
            raise ValueError("No prompts to draw.")
        c = self.config
        steps = c.sampling.steps if steps is None else steps
        guidance = c.sampling.guidance if guidance is None else guidance
        sigmas = time.sampling_sigmas(steps, c.flow.num_timesteps, c.flow.shift)
        size = self._batch_size(min(batch_size or c.sampling.batch_size, len(prompts)))
        images = []
        for start in range(0, len(prompts), size):
            batch = list(prompts[start : start + size])
            real = len(batch)
            batch += [""] * (size - real)
            images.append(self._draw_batch(batch, sigmas, guidance, seed, start)[:real])
            if progress:
                progress(start + real)
        return np.concatenate(images)

    def _batch_size(self, size: int) -> int:
        shards = sharding.batch_shards(self.mesh)
        return -(-size // shards) * shards

    def _tell_cut(self, prompts: Sequence[str]) -> None:
        """Warns of prompts that are too long; one of several processes does."""
        for prompt, cut in zip(prompts, self.prompts.cut(prompts), strict=True):
            if cut and jax.process_index() == 0:
                logging.warning("Only %d tokens are read of %r", self.prompts.length, prompt)

    def _draw_batch(self, prompts, sigmas, guidance, seed, first) -> np.ndarray:
        c = self.config
        text = self.prompts.encode([*prompts, ""])
        self._tell_cut(prompts)
        replicated = sharding.replicated(self.mesh)
        with jax.set_mesh(self.mesh):
            images = sampler.draw(
                sampler.make(c, self.autoencoder, guided=guidance != 1),
                {"params": self.params, "frozen": self.frozen},
                sharding.put(
                    {name: x[:-1] for name, x in text.items()}, sharding.batch_sharding(self.mesh)
                ),
                sharding.put({name: x[-1:] for name, x in text.items()}, replicated),
                sharding.put(np.arange(first, first + len(prompts)), replicated),
                jax.random.key(seed),
                sigmas,
                np.float32(guidance),
            )
            gathered = jax.device_put(images, replicated)
        return np.asarray(gathered)


def trained_params(stored: Stored, config: ConfigDict, like: Any) -> Any:
    """The trained parameters of a model on disk, in the dtypes and places of the tree `like`.

    Raises ConfigError where they are not those of `config`.
    """
    if not stored.whole:
        raise ConfigError(f"{stored.where} is a part of a model ({', '.join(stored.parts)}).")
    found = {p: s for p, s in stored.weights.items() if p.split("/")[0] not in frozen.PARTS}
    wanted = {path: x.shape for path, x in flatten_dict(like, sep="/").items()}
    given = {path: source.shape for path, source in found.items()}
    for name in ("memory", "dit"):
        wanted |= {f"{name}.{key}": value for key, value in config[name].items()}
        given |= {f"{name}.{key}": value for key, value in stored.config[name].items()}
    wrong = [
        f"{key} is {wanted.get(key, 'missing')}, there {given.get(key, 'missing')}"
        for key in sorted(wanted.keys() | given.keys())
        if wanted.get(key) != given.get(key) and not key.endswith((".remat", ".unroll"))
    ]
    if wrong:
        some = "; ".join(wrong[:5]) + ("; ..." if wrong[5:] else "")
        raise ConfigError(f"The config and {stored.where} are of different models: {some}.")
    with users_files():
        places = jax.tree.map(lambda x: x.sharding, like)
        return materialise(found, places, jax.tree.map(lambda x: x.dtype, like))


def as_held(params: Any, config: ConfigDict, mesh: Mesh) -> Any:
    """Checkpointed parameters as drawing holds them; each goes when its copy is there."""

    def one(x, like):
        if x.dtype == like.dtype:
            return x
        held = jax.block_until_ready(x.astype(like.dtype))
        x.delete()
        return held

    return jax.tree.map(one, params, sampler.abstract_params(config, mesh))


def _mesh_here(config: ConfigDict) -> Mesh:
    """The config's mesh, or, where these devices are other ones, all of them as shards."""
    try:
        return sharding.make_mesh(**config.mesh)
    except ConfigError:
        return sharding.make_mesh()
