"""The smallest model and config that have every part. No two sizes are equal without a reason."""

from typing import Any, NamedTuple

from flax.core import meta
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from configs import base
from t2i_jax import build
from t2i_jax.models import fusion
from t2i_jax.models.fusion import TextToImageModel
from t2i_jax.training import optimizer, state, step

LLM = {
    "vocab_size": 300,
    "width": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "mlp_width": 40,
    "rope_theta": 100.0,
    "norm_eps": 1e-6,
}
MEMORY = {"source": "deep"}
DIT = {"width": 24, "num_layers": 2, "mlp_width": 32, "patch_size": 2}
LATENTS = (4, 6, 3)  # height, width, channels: 2 x 3 tokens
LENGTHS = (5, 3, 1)  # real tokens of the prompts
TEXT = 5  # T
WATCHED = {  # what the run of conftest.py's `trained` changes: it validates, draws, and so on
    "train__block_norms": True,
    "profile__start": 1,
    "profile__steps": 2,
    "validation__every": 2,
    "sampling__every": 4,
    "sampling__prompts": ("a red ring", "two blue squares", "a ring"),
}


def model(
    dtype=jnp.float32,
    *,
    llm: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    **dit,
) -> TextToImageModel:
    """The model; other fields of LLM and source as `llm` and `memory`, of the DiT by name."""
    sections = LLM | (llm or {}), MEMORY | (memory or {}), DIT | dit
    return fusion.build(*sections, channels=LATENTS[-1], dtype=dtype)


def in_bfloat16(net: TextToImageModel) -> TextToImageModel:
    """The same model, computing in bfloat16."""
    parts = {
        name: getattr(net, name).clone(dtype=jnp.bfloat16) for name in ("llm", "memory", "dit")
    }
    return net.clone(**parts)


def params(net: TextToImageModel, seed: int = 0) -> Any:
    """Random parameters, none of them zero, float32."""
    one_token = (net.dit.patch_size, net.dit.patch_size, LATENTS[-1])
    boxed = jax.eval_shape(lambda key: fusion.init(net, key, one_token), jax.random.key(0))
    return _random(meta.unbox(boxed), seed)


def _random(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.25 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, abstract)


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """(z, t, ids, mask) of three rows; no token is used twice."""
    rng = np.random.default_rng((seed, 1))
    rows = len(LENGTHS)
    z = rng.standard_normal((rows, *LATENTS)).astype(np.float32)
    t = np.linspace(0.2, 0.9, rows, dtype=np.float32)
    ids = rng.permutation(LLM["vocab_size"])[: rows * TEXT].reshape(rows, TEXT).astype(np.int32)
    mask = np.arange(TEXT) < np.array(LENGTHS)[:, None]
    return z, t, ids, mask


def config(**changes: Any) -> ConfigDict:
    """A run of seconds on the built-in scenes; `changes` by key, '.' written '__'."""
    c = base.get_config().unlock()
    c.name = "tiny"
    c.weights.update(llm="", tokenizer="", autoencoder="")
    c.llm.update(LLM)
    c.pretrain.update(steps=3, batch_size=8, vocab_size=300)
    c.dit.update(DIT | {"patch_size": 4, "remat": "none"})
    c.autoencoder.update(kind="identity", channels=3, downsample=1, scale=1.0, shift=0.0)
    c.data.update(source="scenes", path="", image_size=16, max_text_tokens=12, validation_size=16)
    c.data.update(num_threads=1, prefetch=2)
    c.optimizer.update(name="muon", learning_rate=2e-3, warmup_steps=2)
    c.ema.update(decay=0.9, every=2)
    c.train.update(steps=4, batch_size=16, dtype="float32", frozen_dtype="float32", log_every=1)
    c.checkpoint.update(every=2, keep=2)
    c.validation.update(every=0)
    c.sampling.update(steps=3, guidance=3.0, batch_size=8, every=0)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c.lock()


class Run(NamedTuple):
    """What a train step is made of and takes, everything on one device."""

    config: ConfigDict
    objective: step.Objective
    boxed: Any  # abstract trained parameters with their axes
    update: optax.GradientTransformation
    rate: optax.Schedule
    state: state.TrainState  # random, nothing zero
    frozen: Any
    batch: Any  # NumPy

    def train_step(self, **options):
        """The step as a run has it, not jitted."""
        options = {"accumulation": self.config.train.accumulation} | options
        return step.make_train_step(
            self.objective, self.update, self.rate, ema=self.config.ema, **options
        )


def run(seed: int = 0, **changes: Any) -> Run:
    """The parts of a run of `config(**changes)`, without its data."""
    c = config(**changes)
    net = build.model(c)
    boxed, _ = build.abstract_params(c)
    update, rate = optimizer.make(c.optimizer, c.train.steps, boxed)
    weights = params(net, seed)
    frozen = {"llm": weights.pop("llm"), "autoencoder": {}}
    if c.lora.rank:
        frozen["base"], weights = weights, _random(meta.unbox(boxed), seed)
    rng = np.random.default_rng((seed, 3))
    rows, length, side = c.train.batch_size, c.data.max_text_tokens, c.data.image_size
    batch = {
        "image": rng.integers(0, 256, (rows, side, side, 3), np.uint8),
        "ids": rng.integers(0, c.llm.vocab_size, (rows, length), np.int32),
        "mask": np.arange(length) < rng.integers(1, length + 1, (rows, 1)),
    }
    current = state.create(weights, update)
    objective = step.Objective(net, build.make_autoencoder(c), **c.flow)
    return Run(c, objective, boxed, update, rate, current, frozen, batch)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Asserts that two trees agree, within `tolerance` of each leaf's largest value."""

    def one(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1e-30), err_msg=name
        )

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(one, actual, expected)


def equal(actual: Any, expected: Any) -> None:
    """Asserts that two trees agree bit by bit, dtypes included."""

    def one(path, a, b):
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(one, actual, expected)
