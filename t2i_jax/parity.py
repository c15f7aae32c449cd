"""Goldens: recordings of the published PyTorch system, recomputed here from its own weights.

A golden is one .npz: a model's config.json and tensors under their published names, inputs, and
what the published code computed from them in float32 (velocity, loss, gradients, schedules, guided
sampling). `check` imports the weights as any published model is imported and returns how far each
of these is from ours, with the tolerance it must keep.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple
import zipfile

from etils import epath
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion import flow, guidance, solvers, time
from t2i_jax.interop import reference, reference_config
from t2i_jax.interop.mapping import names_of
from t2i_jax.models import fusion, memory

_PER_PARAMETER_ABSOLUTE = 1e-6  # a gradient norm may be off by this much however small it is


class Error(NamedTuple):
    """How far one quantity is from the recorded one."""

    name: str
    value: float
    tolerance: float

    @property
    def good(self) -> bool:
        """Whether it is within its tolerance; what is not a number is not."""
        return self.value <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a golden, where a tensor of a file is expected."""

    archive: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self.archive[self.key].shape

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return self.archive[self.key].dtype

    def read(self) -> np.ndarray:
        """The array."""
        return self.archive[self.key]


class Golden(NamedTuple):
    """One recording, with the model that it is of."""

    arrays: Mapping[str, np.ndarray]
    theirs: dict[str, Any]  # config.json
    model: fusion.TextToImageModel
    params: Any  # {'llm', 'dit'} and, for a baseline, {'memory'}


def read(file: epath.PathLike) -> Golden:
    """Opens a golden and imports its weights.

    Raises ValueError where it is no golden, or its weights are not its config's.
    """
    try:
        archive = np.load(epath.Path(file), allow_pickle=False)
        arrays = {name: archive[name] for name in archive.files}
        theirs = json.loads(bytes(arrays["config.json"]))
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a recording in .npz with its config.json.") from error

    def tensors(prefix):
        names = [name for name in arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): Array(arrays, name) for name in names}

    params = reference.load_transformer(file, theirs, tensors("transformer/"))
    if "llm" not in params:  # a baseline's language model is another file
        params["llm"] = reference.load_language_model(file, theirs, tensors("llm/"))
    sections = reference_config.sections(theirs)
    # What is recorded was computed on a CPU, by transformers' scaled-dot-product attention, which
    # knows neither Gemma 2's soft cap nor a window that is longer than these prompts.
    sections["llm"] |= {"softcap": 0.0, "max_tokens": 2**30}
    return Golden(arrays, theirs, fusion.build(**sections), params)


def check(file: epath.PathLike) -> list[Error]:
    """All errors of one golden."""
    golden = read(file)
    parts = (_forward, _training, _schedules, _sampling)
    return [error for part in parts for error in part(golden)]


def row(name: str, errors: Sequence[Error]) -> str:
    """One line of text; what is over its tolerance has an exclamation mark."""
    parts = [
        f"{e.name} {e.value:.1e}{'' if e.good else f' (over {e.tolerance:.0e}!)'}" for e in errors
    ]
    return f"{name:<18} {', '.join(parts)}"


def _forward(golden: Golden) -> Iterator[Error]:
    z, model = golden.arrays, _at_timesteps(golden.model)

    @jax.jit
    def run(params, latents, timestep, ids, mask, pooled):
        apply = _apply(model, params)
        features = apply(ids, mask, method="read_text")
        text = apply(features, pooled, method="remember")
        return features.hidden_BTD, apply(latents, timestep, text, method="denoise")

    hidden, velocity = run(golden.params, _nhwc(z["in/latents"]), *_times_and_text(golden))
    yield Error("velocity", _relative(velocity, _nhwc(z["out/velocity"])), 1e-5)
    if "out/text_hidden_states" in z:
        yield Error("hidden states", _relative(hidden, z["out/text_hidden_states"]), 1e-5)


def _training(golden: Golden) -> Iterator[Error]:
    """Loss and gradients at recorded noise and times."""
    z, model = golden.arrays, _at_timesteps(golden.model)
    trained = {name: part for name, part in golden.params.items() if name not in fusion.FROZEN}
    timestep, ids, mask, pooled = _times_and_text(golden)
    data, noise = _nhwc(z["train/x0"]), _nhwc(z["train/noise"])

    @jax.jit
    def loss_and_gradient(trained, frozen):
        features = _apply(model, frozen)(ids, mask, method="read_text")
        latents = flow.interpolate(data, noise, timestep / 1000)

        def loss(trained):
            apply = _apply(model, trained)
            text = apply(features, pooled, method="remember")
            velocity = apply(latents, timestep, text, method="denoise")
            return jnp.mean(flow.mse_B(velocity, flow.velocity(data, noise)))

        return jax.value_and_grad(loss)(trained)

    frozen = {name: golden.params[name] for name in fusion.FROZEN}
    loss, grads = loss_and_gradient(trained, frozen)
    yield Error("loss", _relative(loss, z["train/loss"]), 1e-6)
    flat = {p: np.asarray(x, np.float64) for p, x in flatten_dict(grads, sep="/").items()}
    norm = np.sqrt(sum(np.square(x).sum() for x in flat.values()))
    yield Error("gradient norm", _relative(norm, z["train/grad_norm"]), 1e-5)
    yield Error("of a parameter", _worst_parameter(golden, flat), 1e-3)


def _worst_parameter(golden: Golden, grads: Mapping[str, np.ndarray]) -> float:
    """The largest relative error of a parameter's gradient norm; inf where one is not there."""
    expected = {
        name.removeprefix("train/grad_norm_of/"): float(x)
        for name, x in golden.arrays.items()
        if name.startswith("train/grad_norm_of/")
    }
    worst = 0.0
    for rule in reference.rules(golden.theirs, dict.fromkeys(grads)):
        grad = grads[rule.ours]
        layers = grad if rule.stacked else grad[None]
        for name, layer in zip(names_of(rule, grad.shape), layers, strict=True):
            if name not in expected:
                return np.inf
            norm, right = np.linalg.norm(layer), expected.pop(name)
            if not np.isfinite(norm + right):
                return np.inf
            if abs(norm - right) > _PER_PARAMETER_ABSOLUTE:
                worst = max(worst, abs(norm - right) / max(right, 1e-30))
    return np.inf if expected else worst


def _schedules(golden: Golden) -> Iterator[Error]:
    z = golden.arrays
    count, steps = len(z["sampler/train_timesteps"]), len(z["sampler/timesteps"])
    sigmas = np.asarray(time.training_sigmas(count, 3.0))
    theirs = z["sampler/train_sigmas"]  # with or without the 0 that ends it
    worst = np.abs(np.append(sigmas, 0)[: len(theirs)] - theirs).max()
    worst = max(worst, np.abs(1000 * sigmas - z["sampler/train_timesteps"]).max() / 1000)
    yield Error("training schedule", float(worst), 1e-6)
    sigmas = time.sampling_sigmas(steps, count, 3.0)
    worst = np.abs(sigmas - z["sampler/sigmas"]).max()
    worst = max(worst, np.abs(1000 * sigmas[:-1] - z["sampler/timesteps"]).max() / 1000)
    yield Error("sampling schedule", float(worst), 1e-6)


def _sampling(golden: Golden) -> Iterator[Error]:
    """Euler with guidance from memories made once, as published without a cache."""
    latents = _sample(golden, lambda text: text)
    yield Error("samples", _relative(latents, _nhwc(golden.arrays["sampler/latents"])), 1e-4)


def published_cache(file: epath.PathLike) -> float:
    """How far samples are from the recorded ones if made as the published code's cache makes them.

    That cache (`use_cache=True`) keeps the text's keys from the first step, as a memory does, but
    lets the image's rotary positions start at 0 from the second step on, not behind the text.
    """
    golden = read(file)
    latents = _sample(golden, lambda text: text.replace(start_B=jnp.zeros_like(text.start_B)))
    return _relative(latents, _nhwc(golden.arrays["sampler/latents"]))


def _sample(golden: Golden, later: Callable[[memory.TextMemory], memory.TextMemory]) -> jax.Array:
    """Samples; from the second step on with `later(memory)`. Half of the rows are null prompts."""
    z, model = golden.arrays, golden.model
    half = len(z["sampler/noise"])
    levels = time.sampling_sigmas(len(z["sampler/timesteps"]), 1000, 3.0)
    ids, mask, pooled = _text(golden, "sampler", "sampler/text_modulation_embeds")
    how, scale = guidance.Guidance(), float(z["sampler/guidance_scale"])
    rows = solvers.plan("euler", levels) | how.rows(scale, levels)

    @jax.jit
    def sample(params, noise, ids, mask, pooled, rows):
        apply = _apply(model, params)

        def denoise(latents, t_B, texts):
            return apply(latents, t_B, texts, method="denoise")

        def encode(which):
            some = None if pooled is None else pooled[which]
            return apply(ids[which], mask[which], some, method="encode_text")

        def velocity(change):
            texts = (change(text) for text in (prompts, null))
            return guidance.guided(denoise, *texts, how, memory.interleave)

        null, prompts = encode(slice(half)), encode(slice(half, None))
        first, rest = (jax.tree.map(lambda x, s=s: x[s], rows) for s in (slice(1), slice(1, None)))
        latents = solvers.solve("euler", velocity(lambda text: text), noise, first)
        return solvers.solve("euler", velocity(later), latents, rest)

    return sample(golden.params, _nhwc(z["sampler/noise"]), ids, mask, pooled, rows)


def _at_timesteps(model: fusion.TextToImageModel) -> fusion.TextToImageModel:
    """The model taking 1000 t for t: not all recorded timesteps are a float32 times 1000."""
    return model.clone(dit=model.dit.clone(time_scale=1.0))


def _apply(model, params):
    return lambda *args, **options: model.apply({"params": params}, *args, **options)


def _text(golden: Golden, where: str, pooled: str):
    z = golden.arrays
    mask = z[f"{where}/attention_mask"].astype(bool)
    return z[f"{where}/input_ids"], mask, z.get(pooled)


def _times_and_text(golden: Golden):
    text = _text(golden, "in", "in/text_modulation_embeds")
    return np.float32(golden.arrays["in/timestep"]), *text


def _nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def _relative(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected|, over all elements."""
    actual, expected = np.float64(actual), np.float64(expected)
    if actual.shape != expected.shape:
        return np.inf
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
