"""The text memory: all that image tokens ever see of the prompt.

Text tokens never attend to image tokens and the language model is frozen, so what the prompt
contributes to layer l of the DiT is a constant of the prompt: keys and values (B, T, K, H) and a
padding mask, the same for every noise level and every sampling step. A *source* makes a memory
from what the language model read; the DiT does not know which one.
"""

import flax.struct
import jax
import jax.numpy as jnp

from t2i_jax.models.positions import rotate, text_angles


@flax.struct.dataclass
class TextFeatures:
    """What the frozen language model read.

    Attributes:
      keys_LBTKH: keys of every layer (L, B, T, K, H), before they are turned to their positions.
      values_LBTKH: values of every layer.
      hidden_BTD: the final, normalised hidden state.
      mask_BT: True at real tokens.
    """

    keys_LBTKH: jax.Array
    values_LBTKH: jax.Array
    hidden_BTD: jax.Array
    mask_BT: jax.Array


@flax.struct.dataclass
class TextMemory:
    """Keys and values of the text for every layer of the DiT.

    Attributes:
      keys_LBTKH: (L, B, T, K, H), L layers of the DiT.
      values_LBTKH: likewise.
      mask_BT: True at real tokens.
      pooled_BP: an embedding of the whole prompt, or None.
    """

    keys_LBTKH: jax.Array
    values_LBTKH: jax.Array
    mask_BT: jax.Array
    pooled_BP: jax.Array | None = None

    @property
    def length_B(self) -> jax.Array:
        """Number of real text tokens of each prompt."""
        return jnp.sum(self.mask_BT, axis=-1)


def deep(features: TextFeatures, num_layers: int, rope_theta: float) -> TextMemory:
    """Deep fusion: DiT layer i sees the LLM's own keys and values of its layer L - num_layers + i.

    The keys are turned to their positions 0..T-1, as the LLM's own attention turns them.

    Raises ValueError where the DiT has more layers than the LLM.
    """
    available = features.keys_LBTKH.shape[0]
    if num_layers > available:
        raise ValueError(
            f"A DiT of {num_layers} layers cannot share the {available} layers of its LLM; "
            "set dit.num_layers to at most llm.num_layers."
        )
    keys_LBTKH = features.keys_LBTKH[available - num_layers :]
    length, _, head_width = keys_LBTKH.shape[2:]
    angles = text_angles(length, head_width, rope_theta)
    return TextMemory(
        keys_LBTKH=jax.vmap(rotate, (0, None))(keys_LBTKH, angles),
        values_LBTKH=features.values_LBTKH[available - num_layers :],
        mask_BT=features.mask_BT,
    )


def concatenate(*memories: TextMemory) -> TextMemory:
    """Joins memories along the batch; their text lengths T must be equal."""
    pooled = [m.pooled_BP for m in memories]
    return TextMemory(
        keys_LBTKH=jnp.concatenate([m.keys_LBTKH for m in memories], axis=1),
        values_LBTKH=jnp.concatenate([m.values_LBTKH for m in memories], axis=1),
        mask_BT=jnp.concatenate([m.mask_BT for m in memories], axis=0),
        pooled_BP=None if pooled[0] is None else jnp.concatenate(pooled, axis=0),
    )


def repeat(memory: TextMemory, times: int) -> TextMemory:
    """The memory of one prompt (B = 1) for a batch of `times`."""
    pooled_BP = memory.pooled_BP
    return TextMemory(
        keys_LBTKH=jnp.repeat(memory.keys_LBTKH, times, axis=1),
        values_LBTKH=jnp.repeat(memory.values_LBTKH, times, axis=1),
        mask_BT=jnp.repeat(memory.mask_BT, times, axis=0),
        pooled_BP=None if pooled_BP is None else jnp.repeat(pooled_BP, times, axis=0),
    )
