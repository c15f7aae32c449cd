"""The language model: a decoder-only tower of the Gemma family.

ids -> keys and values of every layer and the final hidden state (arXiv 2403.08295, section 2).
Shape letters as in layers.py, L layers, V vocabulary.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.attention import attend
from t2i_jax.models.memory import TextFeatures
from t2i_jax.models.positions import rotate, text_angles
from t2i_jax.sharding import constrain

# Keys and values of about unit variance at any width; at Gemma 2B's this is its 0.02.
_INIT = layers.unit_variance


class LLMBlock(nn.Module):
    """Pre-norm causal attention and gated MLP; also hands out its keys and values."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x_BTD, mask_BTT, angles):
        both = {"init": _INIT, "dtype": self.dtype}
        width = x_BTD.shape[-1]
        h_BTD = layers.RMSNorm(self.norm_eps, name="attention_norm")(x_BTD)
        q_BTNH, k_BTKH, v_BTKH = layers.QKV(
            self.num_heads, self.num_kv_heads, self.head_width, name="attention", **both
        )(h_BTD)
        turned = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        a_BTNH = attend(*turned, v_BTKH, mask_BTT, scale=self.head_width**-0.5)
        x_BTD = x_BTD + layers.output_projection(a_BTNH, width, name="attention_out", **both)
        h_BTD = layers.RMSNorm(self.norm_eps, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + layers.GatedMLP(width, self.mlp_width, name="mlp", **both)(h_BTD)
        return constrain(x_BTD, "batch", "text", None), (k_BTKH, v_BTKH)


class LLM(nn.Module):
    """Gemma: (B, T) token ids, right-padded, and their mask -> TextFeatures."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    unroll: int = 1
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        self.embed = layers.Embed(self.vocab_size, self.width, self.dtype)
        block = layers.scan_layers(LLMBlock, self.num_layers, (nn.broadcast,) * 2, self.unroll)
        self.blocks = block(
            self.num_heads,
            self.num_kv_heads,
            self.head_width,
            self.mlp_width,
            self.norm_eps,
            self.dtype,
        )
        self.final_norm = layers.RMSNorm(self.norm_eps)

    def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> TextFeatures:
        """Reads the prompts; padding (mask False) is seen by no real token."""
        chex.assert_rank([ids_BT, mask_BT], 2)
        chex.assert_equal_shape([ids_BT, mask_BT])
        length = ids_BT.shape[1]
        mask_BT = mask_BT.astype(bool)
        mask_BTT = jnp.tril(jnp.ones((length, length), bool)) & mask_BT[:, None, :]
        x_BTD = self.embed.encode(ids_BT) * jnp.asarray(self.width**0.5, self.dtype)
        x_BTD = constrain(x_BTD, "batch", "text", None)
        angles = text_angles(length, self.head_width, self.rope_theta)
        x_BTD, (k_LBTKH, v_LBTKH) = self.blocks(x_BTD, mask_BTT, angles)
        hidden_BTD = self.final_norm(x_BTD).astype(self.dtype)
        return TextFeatures(k_LBTKH, v_LBTKH, hidden_BTD, mask_BT)

    def logits(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Next-token logits (B, T, V), float32."""
        return self.embed.decode(self(ids_BT, mask_BT).hidden_BTD)
