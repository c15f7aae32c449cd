"""The whole text-to-image model: a frozen language model, a memory of the text, a trained DiT.

    ids --LLM--> TextFeatures --source--> TextMemory --+
                                                       v
                            z, t -------------------> DiT -> velocity

Parameters are {'llm': frozen, 'dit': trained}, and {'memory': trained} where the source has any.
Everything left of the memory depends on the prompt alone; it is computed once a batch in training,
and once a prompt in sampling.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import lora
from t2i_jax.models.dit import DiT
from t2i_jax.models.llm import LLM, from_config
from t2i_jax.models.memory import Source, TextFeatures, TextMemory, find_source

FROZEN = ("llm",)  # top-level parts of the parameters that are never trained
_SHARED = ("num_heads", "num_kv_heads", "head_width", "rope_theta", "norm_eps")  # LLM and DiT


class TextToImageModel(nn.Module):
    """LLM + memory source + DiT. Use `encode_text` once a prompt, `denoise` once a step."""

    llm: LLM
    memory: Source
    dit: DiT
    lora_scale: float = 0.0  # alpha / rank of its low-rank factors; 0: it has none

    def read_text(self, ids_BT: jax.Array, mask_BT: jax.Array) -> TextFeatures:
        """What the frozen language model makes of the prompts."""
        return self.llm(ids_BT, mask_BT)

    def remember(self, features: TextFeatures, pooled_BP: jax.Array | None = None) -> TextMemory:
        """The memory that the DiT sees of it, with a pooled embedding where the model has one."""
        return self.memory(features).replace(pooled_BP=pooled_BP)

    def encode_text(
        self, ids_BT: jax.Array, mask_BT: jax.Array, pooled_BP: jax.Array | None = None
    ) -> TextMemory:
        """(B, T) right-padded ids and mask, and a pooled embedding or None -> TextMemory."""
        return self.remember(self.read_text(ids_BT, mask_BT), pooled_BP)

    def denoise(self, z_BHWC: jax.Array, t_B: jax.Array, memory: TextMemory) -> jax.Array:
        """Velocity (noise - data) at latents z and times t in [0, 1], 1 = noise."""
        return self.dit(z_BHWC, t_B, memory)

    def __call__(self, z_BHWC, t_B, ids_BT, mask_BT, pooled_BP=None) -> jax.Array:
        """Text and image at once: what the two halves give one after the other."""
        return self.denoise(z_BHWC, t_B, self.encode_text(ids_BT, mask_BT, pooled_BP))


def build(
    llm: Mapping[str, Any],
    memory: Mapping[str, Any],
    dit: Mapping[str, Any],
    *,
    channels: int,
    dtype=jnp.float32,
    kernel: str = "auto",
    lora_scale: float = 0.0,
) -> TextToImageModel:
    """The model of three config sections. The DiT takes its heads and rotary base from the LLM.

    `dtype` is of the computation, `kernel` of attention (`attention.KERNELS`).

    Raises TypeError for a key that the constructors do not know, ValueError for an unknown source.
    """
    memory = dict(memory)
    source = find_source(memory.pop("source"))
    # Text keys carry positions where they stand in one softmax with the image's.
    joint = dit.get("attention", "joint") == "joint"
    remember = source(
        num_layers=dit["num_layers"],
        width=dit["width"],
        rope_theta=llm["rope_theta"] if joint else None,
        norm_eps=llm["norm_eps"],
        dtype=dtype,
        **memory,
    )
    num_shared = remember.num_shared(llm["num_layers"])
    shared = {key: llm[key] for key in _SHARED}
    if num_shared and llm.get("softcap_shared", False):
        shared |= {key: llm[key] for key in ("softcap", "query_scalar")}
    return TextToImageModel(
        llm=from_config(llm, num_shared, dtype, kernel),
        memory=remember,
        dit=DiT(
            **dit,
            **shared,
            normalise_text=source.normalises_keys,
            channels=channels,
            dtype=dtype,
            kernel=kernel,
        ),
        lora_scale=lora_scale,
    )


def variables(model: TextToImageModel, trained: Any, frozen: Any) -> dict[str, Any]:
    """What `model.apply` takes for 'remember' and 'denoise'.

    With low-rank factors these are what is trained, and the rest of the model is `frozen["base"]`.
    """
    if not model.lora_scale:
        return {"params": trained}
    return {"params": frozen["base"], "lora": lora.scaled(trained, model.lora_scale)}


def init(model: TextToImageModel, key: jax.Array, latent_shape: tuple[int, int, int]) -> Any:
    """Boxed (logically partitioned) parameters {'llm': ..., 'dit': ...}; traceable."""
    z = jnp.zeros((1, *latent_shape), jnp.float32)
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    pooled = jnp.zeros((1, model.dit.pooled_width)) if model.dit.pooled_width else None
    return model.init(key, z, jnp.zeros((1,)), ids, mask, pooled)["params"]
