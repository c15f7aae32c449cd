"""The whole text-to-image model: a frozen language model, a memory of the text, a trained DiT.

    ids --LLM--> TextFeatures --source--> TextMemory --+
                                                       v
                            z, t -------------------> DiT -> velocity

Parameters are {'llm': frozen, 'dit': trained}. Everything left of the memory depends on the prompt
alone; it is computed once a batch in training, and once a prompt in sampling.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models.dit import DiT
from t2i_jax.models.llm import LLM
from t2i_jax.models.memory import TextFeatures, TextMemory, deep

FROZEN = ("llm",)  # top-level parts of the parameters that are never trained


class TextToImageModel(nn.Module):
    """LLM + memory source + DiT. Use `encode_text` once a prompt, `denoise` once a step."""

    llm: LLM
    dit: DiT

    def read_text(self, ids_BT: jax.Array, mask_BT: jax.Array) -> TextFeatures:
        """What the frozen language model makes of the prompts."""
        return self.llm(ids_BT, mask_BT)

    def remember(self, features: TextFeatures, pooled_BP: jax.Array | None = None) -> TextMemory:
        """The memory that the DiT sees of it, with CLIP's embedding of the prompts if any."""
        memory = deep(features, self.dit.num_layers, self.dit.rope_theta)
        return memory.replace(pooled_BP=pooled_BP)

    def encode_text(self, ids_BT: jax.Array, mask_BT: jax.Array) -> TextMemory:
        """(B, T) right-padded ids and mask -> TextMemory."""
        return self.remember(self.read_text(ids_BT, mask_BT))

    def denoise(self, z_BHWC: jax.Array, t_B: jax.Array, memory: TextMemory) -> jax.Array:
        """Velocity (noise - data) at latents z and times t in [0, 1], 1 = noise."""
        return self.dit(z_BHWC, t_B, memory)

    def __call__(self, z_BHWC, t_B, ids_BT, mask_BT) -> jax.Array:
        """Text and image at once: what the two halves give one after the other."""
        return self.denoise(z_BHWC, t_B, self.encode_text(ids_BT, mask_BT))


def build(
    llm: Mapping[str, Any], dit: Mapping[str, Any], *, channels: int, dtype=jnp.float32
) -> TextToImageModel:
    """The model of two config sections. The DiT takes its heads and rotary base from the LLM.

    Raises TypeError for a key that the constructors do not know.
    """
    shared = ("num_heads", "num_kv_heads", "head_width", "rope_theta", "norm_eps")
    return TextToImageModel(
        llm=LLM(**llm, dtype=dtype),
        dit=DiT(**dit, **{key: llm[key] for key in shared}, channels=channels, dtype=dtype),
    )


def init(model: TextToImageModel, key: jax.Array, latent_shape: tuple[int, int, int]) -> Any:
    """Boxed (logically partitioned) parameters {'llm': ..., 'dit': ...}; traceable."""
    z = jnp.zeros((1, *latent_shape), jnp.float32)
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, z, jnp.zeros((1,)), ids, jnp.ones((1, 1), bool))["params"]
