"""From prompts to images.

    pipeline = Pipeline.load("runs/scenes")
    images = pipeline(["a red ring above a blue square"], seed=0)

The text memory of a prompt is made once for all steps, that of the empty prompt once a batch.
Image i of a seed starts from noise that depends on (seed, i) alone, so it is the same picture in
any batch and on any number of devices: bit by bit on a CPU, unless a size of batches is asked for,
elsewhere as far as a compiler rounds sums alike in programs for other shapes.
"""

from collections.abc import Callable, Sequence
import difflib
import inspect
from typing import Any, NamedTuple

from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from t2i_jax import build, checkpoint, convert, frozen, inputs, sampler, sharding
from t2i_jax.data.prompts import Prompts
from t2i_jax.errors import ConfigError, users_files
from t2i_jax.interop.mapping import materialise
from t2i_jax.interop.stored import Stored
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.models.fusion import TextToImageModel
from t2i_jax.options import Options, resolve
from t2i_jax.progress import Progress

_TOLD = 3  # prompts that are cut, of those of a call


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
    step: int | None = None  # of training, after which the weights are; None: not known

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
        _refuse_what_is_not_finite(path, params, frozen_params)
        return cls(config, autoencoder, prompts, params, frozen_params, mesh, step)

    @classmethod
    def _of(cls, stored: Stored) -> "Pipeline":
        config, mesh = stored.config, _mesh_here(stored.config)
        params = trained_params(stored, config, sampler.abstract_params(config, mesh))
        prompts = frozen.make_prompts(config, stored.tokenizer, stored.clip_tokenizer)
        autoencoder, frozen_params = frozen.place(config, mesh, stored.weights, stored.autoencoder)
        _refuse_what_is_not_finite(stored.where, params, frozen_params)
        return cls(config, autoencoder, prompts, params, frozen_params, mesh, stored.step)

    @property
    def model(self) -> TextToImageModel:
        """The networks that `params` and `frozen` are of."""
        return build.model(self.config)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        solver: str | None = None,
        progress: bool = True,
        **more: Any,
    ) -> list[Image.Image]:
        """`num_images` images of each prompt, those of the first prompt first.

        Sizes, steps, scale and solver default to the model's config; `progress` shows a bar on
        stderr; `more` is as of `draw`. Raises as `draw`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(num_images, int) or num_images < 1:
            raise ConfigError(f"num_images = {num_images!r}: a whole number, at least one.")

        def for_each_image(given: Any) -> Any:
            """What is given for each prompt, as often as the prompt."""
            several = isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 4
            if not several or len(given) != len(prompts):
                return given
            return [one for one in given for _ in range(num_images)]

        negative_prompt = for_each_image(negative_prompt)
        more |= {k: for_each_image(more[k]) for k in ("image", "latents") if k in more}
        prompts = for_each_image(prompts)
        shown = progress and jax.process_index() == 0
        with Progress(len(prompts), name="drawing", shown=shown) as bar:
            images = self.draw(
                prompts,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                solver=solver,
                progress=bar.update,
                **more,
            )
        return [Image.fromarray(image) for image in images]

    def draw(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        image: Any = None,
        strength: float | None = None,
        latents: np.ndarray | None = None,
        decode: bool = True,
        batch_size: int | None = None,
        callback: Callable[[int, float, jax.Array], Any] | None = None,
        progress: Callable[[int], Any] | None = None,
        tell: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """One image a prompt: uint8 (n, H, W, 3).

        Args:
          prompts: n of them; '' is drawn without a prompt. What is too long for the model is cut,
            with a warning that says where.
          negative_prompt: what guidance leads away from, one for all or one for each; None: ''.
          seed: of the noise.
          numbers: of the images, by default 0 to n - 1: the noise of an image depends on the seed
            and its number alone.
          image: one or n images (PIL, or uint8 arrays) to start from: they are brought to the size
            that is drawn, cropped at the sides, and noise is added to them.
          strength: with `image`, how much noise: the share of the steps that are taken, by default
            0.8.
          latents: float (n, H', W', C), instead of the noise that drawing starts from.
          decode: False: latents come back, float32 (n, H', W', C), of which `decode` makes images.
          batch_size: images at once, all devices together; by default the config's, on a CPU one a
            device. Programs for other sizes may round sums otherwise.
          callback: called with the number of the step (from 1), the noise level that it came to
            and the latents (B, H', W', C) after each step of each batch; latents that it returns
            are gone on with. The steps are programs of their own then.
          progress: called with the number of images drawn so far.
          tell: False: nothing is said of prompts that are cut.
          **options: as of `options.resolve`.

        Raises ConfigError (a ValueError) for what cannot be drawn.
        """
        c, n = self.config, len(inputs.checked_prompts(prompts))
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ConfigError(f"seed = {seed!r}: a whole number from 0 to 2**32 - 1.")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}: at least one.")
        known = inspect.signature(resolve).parameters
        for name in options.keys() - known.keys():
            near = difflib.get_close_matches(name, [*known], 1)
            raise ConfigError(
                f"There is no option {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
        if image is not None and latents is not None:
            raise ConfigError("image and latents both say what to start from: give one.")
        if image is not None:
            options["strength"] = 0.8 if strength is None else strength
        elif strength is not None:
            raise ConfigError(f"strength = {strength} is for an image to start from: give one.")
        chosen = resolve(c, **options)
        sampler_ = sampler.make(c, self.autoencoder, chosen, decodes=decode)
        start = {
            "numbers": inputs.checked_numbers(numbers, n),
            "latents": inputs.checked_latents(latents, (n, *sampler_.latent_shape)),
            "image": inputs.fitted(image, n, chosen),
        }
        nulls = inputs.negatives(negative_prompt, n)
        if tell:
            self.tell_cut([*prompts, *nulls])
        drawing = _Drawing(self, sampler_, chosen, jax.random.key(seed), callback)
        size = self._batch_size(n, batch_size)
        images = []
        for first in range(0, n, size):
            rows = slice(first, first + size)
            part = {name: None if x is None else x[rows] for name, x in start.items()}
            images.append(drawing.batch(list(prompts[rows]), nulls[rows], part, size))
            if progress:
                progress(min(first + size, n))
        return np.concatenate(images)

    def _batch_size(self, n: int, most: int | None) -> int:
        """Rows of a batch: of few sizes, so that few programs are compiled.

        A program for other rows a device may round sums otherwise. A CPU draws a batch hardly
        faster than its images one by one, so there each device draws one, and always the same.
        """
        shards = sharding.batch_shards(self.mesh)
        if most is None:
            on_cpu = self.mesh.devices.flat[0].platform == "cpu"
            most = shards if on_cpu else self.config.sampling.batch_size
        size = shards
        while size < min(n, most):
            size *= 2
        return min(size, -(-most // shards) * shards)

    def decode(self, latents: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Latents (n, H', W', C), as `draw` returns them, -> images uint8 (n, H, W, 3).

        Raises ConfigError for others.
        """
        shape = (len(latents), *np.shape(latents)[1:3], self.autoencoder.channels)
        latents = inputs.checked_latents(latents, shape)
        size, images = self._batch_size(len(latents), batch_size), []
        rows, whole = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        for first in range(0, len(latents), size):
            part = inputs.padded(latents[first : first + size], size)
            with jax.set_mesh(self.mesh):
                params, z = self.frozen["autoencoder"], sharding.put(part, rows)
                decoded = sampler.decode(self.autoencoder, params, z)
                images.append(np.asarray(jax.device_put(decoded, whole)))
        return np.concatenate(images)[: len(latents)]

    def tell_cut(self, prompts: Sequence[str]) -> None:
        """Warns of prompts that are too long, once each; one of several processes does."""
        if jax.process_index():
            return
        prompts = list(dict.fromkeys(prompts))
        read = zip(prompts, self.prompts.read(prompts), strict=True)
        cut = [(prompt, count) for prompt, count in read if count is not None]
        for prompt, count in cut[:_TOLD]:
            logging.warning(
                "A prompt of %d characters is cut: %d tokens are read, up to ...%r; what is lost "
                "begins with %r",
                len(prompt),
                self.prompts.length,
                prompt[:count][-40:],
                prompt[count:][:40],
            )
        if len(cut) > _TOLD:
            logging.warning("%d of %d prompts are cut like these", len(cut), len(prompts))


class _Drawing(NamedTuple):
    """Batches of one call."""

    pipeline: Pipeline
    sampler: sampler.Sampler
    options: Options
    key: jax.Array
    callback: Callable[[int, float, jax.Array], Any] | None

    def batch(
        self, prompts: list[str], nulls: Sequence[str], start: dict[str, Any], size: int
    ) -> np.ndarray:
        """Images or latents of at most `size` prompts, by a program for `size`."""
        real, mesh = len(prompts), self.pipeline.mesh
        rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

        prompts = prompts + [""] * (size - real)
        same = len(set(nulls)) == 1
        nulls = list(nulls[:1]) if same else [*nulls, *[""] * (size - real)]
        encode = self.pipeline.prompts.encode
        with jax.set_mesh(mesh):
            text = sharding.put(encode(prompts), rows)
            null = sharding.put(encode(nulls), whole if same else rows)
            number_B = sharding.put(inputs.padded(start["numbers"], size), whole)
            level = sharding.put(np.float32(self.options.start), whole)
            first = sampler.Start(self.key, number_B, level)
            if start["latents"] is not None:
                latents = sharding.put(inputs.padded(start["latents"], size), rows)
                first = first._replace(latents_BHWC=latents)
            if start["image"] is not None:
                pixels = sharding.put(inputs.padded(start["image"], size), rows)
                fixed = self.pipeline.frozen["autoencoder"]
                encoded = sampler.encode(self.pipeline.autoencoder, fixed, pixels)
                first = first._replace(image_BHWC=encoded)
            drawn = self._run(text, null, first)
            gathered = jax.device_put(drawn, whole)
        return np.asarray(gathered)[:real]

    def _run(self, text: Any, null: Any, first: sampler.Start) -> jax.Array:
        pipeline, table = self.pipeline, sampler.table(self.options)
        weights = {"params": pipeline.params, "frozen": pipeline.frozen}
        if self.callback is None:
            return sampler.draw(self.sampler, weights, text, null, first, table)
        levels = self.options.levels
        memories, state = sampler.prepare(self.sampler, weights, text, null, first)
        for i, level in enumerate(levels[1:]):
            row = {name: column[i] for name, column in table.items()}
            state = sampler.advance(self.sampler, weights, memories, state, row, first)
            changed = self.callback(i + 1, float(level), state.z)
            if changed is not None:
                z = inputs.checked_latents(np.asarray(changed), state.z.shape)
                state = state._replace(z=sharding.put(z, state.z.sharding))
        return sampler.finish(self.sampler, weights, state.z)


def check_there(path: epath.PathLike) -> None:
    """Raises UserError where `Pipeline.load` would find no model."""
    if not convert.is_converted(path):
        checkpoint.find(path)


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


def _refuse_what_is_not_finite(where: Any, params: Any, frozen_params: Any) -> None:
    """Raises ConfigError where a weight is not a number: all pictures would be black, or none."""
    weights = {"params": params, **frozen_params}
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(weights)
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, good in jax.tree.leaves_with_path(finite)
        if not good
    ]
    if bad:
        some = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ConfigError(
            f"{where} has weights that are not finite, in {len(bad)} of its arrays: {some}. "
            "Nothing can be drawn with it; take another checkpoint."
        )


def _mesh_here(config: ConfigDict) -> Mesh:
    """The config's mesh, or, where these devices are other ones, all of them as shards."""
    try:
        return sharding.make_mesh(**config.mesh)
    except ConfigError:
        return sharding.make_mesh()
