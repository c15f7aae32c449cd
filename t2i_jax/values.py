"""What a key of a config may be, whatever the others are: choices of words, ranges of numbers."""

from collections.abc import Callable

from t2i_jax.data.sources import SOURCES
from t2i_jax.diffusion.guidance import METHODS as GUIDANCE_METHODS
from t2i_jax.diffusion.solvers import SOLVERS
from t2i_jax.models.attention import KERNELS
from t2i_jax.models.clip import ACTIVATIONS as CLIP_ACTIVATIONS
from t2i_jax.models.conditioning import CONDITIONING
from t2i_jax.models.dit import ATTENTIONS, PREDICTIONS
from t2i_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from t2i_jax.models.lora import PRODUCTS
from t2i_jax.models.memory import SOURCES as MEMORY_SOURCES
from t2i_jax.models.positions import IMAGE_POSITIONS
from t2i_jax.quantization import METHODS as QUANTIZATIONS
from t2i_jax.training.optimizer import OPTIMIZERS, SCHEDULES

CHOICES: dict[str, tuple[str, ...]] = {
    "autoencoder.kind": ("kl", "identity"),
    "clip.activation": tuple(CLIP_ACTIVATIONS),
    "data.source": tuple(SOURCES),
    "dit.attention": tuple(ATTENTIONS),
    "dit.conditioning": tuple(CONDITIONING),
    "dit.positions": tuple(IMAGE_POSITIONS),
    "dit.prediction": tuple(PREDICTIONS),
    "dit.remat": tuple(REMAT_POLICIES),
    "llm.activation": tuple(ACTIVATIONS),
    "lora.products": tuple(PRODUCTS),
    "memory.source": tuple(MEMORY_SOURCES),
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.schedule": tuple(SCHEDULES),
    "sampling.guidance_method": tuple(GUIDANCE_METHODS),
    "sampling.solver": tuple(SOLVERS),
    "train.attention": KERNELS,
    "train.dtype": ("float32", "bfloat16"),
    "train.frozen_dtype": ("float32", "bfloat16"),
    "train.llm_quantization": QUANTIZATIONS,
}

_Range = tuple[Callable[[float], bool], str]
POSITIVE: _Range = (lambda x: x > 0, "positive")
_OR_ZERO: _Range = (lambda x: x >= 0, "zero or more")
_RATE: _Range = (lambda x: 0 <= x <= 1, "from 0 to 1")
_DECAY: _Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_SHARDS: _Range = (lambda x: x == -1 or x > 0, "positive, or -1: the rest of the devices")

# What numbers may be. Those that are not named here are POSITIVE.
RANGES: dict[str, _Range] = {
    "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
    "pretrain.steps": _OR_ZERO,
    "pretrain.vocab_size": (
        lambda x: x == 0 or x >= 260,
        "0, or at least 260: the bytes and the special tokens",
    ),
    "llm.norm_offset": (lambda x: x in (0, 1), "1 or 0"),
    "llm.query_scalar": _OR_ZERO,
    "llm.softcap": _OR_ZERO,
    "llm.logit_softcap": _OR_ZERO,
    "memory.first_layer": _OR_ZERO,
    "lora.rank": _OR_ZERO,
    "dit.table_size": _OR_ZERO,
    "dit.pooled_width": _OR_ZERO,
    "clip.eos_id": _OR_ZERO,
    "clip.projection_width": _OR_ZERO,
    "autoencoder.shift": (lambda x: True, "finite"),
    "autoencoder.tile": _OR_ZERO,
    "flow.time_mean": (lambda x: True, "finite"),
    "data.caption_dropout": _RATE,
    "data.original_caption_rate": _RATE,
    "data.max_text_tokens": (lambda x: x >= 2, "at least 2: the first token, BOS, and one more"),
    "data.validation_size": _OR_ZERO,
    "data.min_image_size": _OR_ZERO,
    "data.max_bad_rate": _RATE,
    "data.num_workers": _OR_ZERO,
    "optimizer.weight_decay": _OR_ZERO,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.warmup_steps": _OR_ZERO,
    "optimizer.decay_steps": _OR_ZERO,
    "ema.decay": _DECAY,
    "train.step_deadline": _OR_ZERO,
    "train.pause_deadline": _OR_ZERO,
    "profile.steps": _OR_ZERO,
    "checkpoint.keep_every": _OR_ZERO,
    "validation.every": _OR_ZERO,
    "sampling.every": _OR_ZERO,
    "evaluation.every": _OR_ZERO,
    "evaluation.num_images": (lambda x: x >= 6, "at least 6"),
    "sampling.guidance": _OR_ZERO,
    "sampling.guidance_rescale": _RATE,
    "sampling.apg_parallel": _OR_ZERO,
    "sampling.apg_norm": _OR_ZERO,
    "sampling.apg_momentum": (lambda x: -1 < x < 1, "between -1 and 1"),
    "sampling.zero_steps": _OR_ZERO,
    "mesh.data": _SHARDS,
    "mesh.fsdp": _SHARDS,
    "mesh.tensor": _SHARDS,
}
