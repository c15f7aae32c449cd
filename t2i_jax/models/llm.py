"""The language model: a decoder-only tower of the Gemma, Gemma 2 or Qwen3 family.

ids -> keys and values of every layer and the final hidden state. Gemma is arXiv 2403.08295, section
2; Gemma 2 (soft caps, norms after each part) arXiv 2408.00118, section 2; Qwen3 (norms of queries
and keys) arXiv 2505.09388, section 2. What a family has is said by the fields; their defaults are
Gemma's. Shape letters as in layers.py, L layers, V vocabulary.
"""

from collections.abc import Mapping
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.attention import attend, soft_cap
from t2i_jax.models.memory import TextFeatures
from t2i_jax.models.positions import rotate, text_angles
from t2i_jax.sharding import constrain

# Keys and values of about unit variance at any width; at Gemma 2B's this is its 0.02.
_INIT = layers.unit_variance


class LLMBlock(nn.Module):
    """Pre-norm causal attention and gated MLP; also hands out its keys and values.

    The keys are those after their norm, if they have one, and before they are turned.
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    dtype: layers.Dtype
    activation: str = "gelu"
    norm_offset: float = 1.0
    post_norms: bool = False
    qk_norm: bool = False
    query_scalar: float = 0.0
    softcap: float = 0.0
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x_BTD, mask_BT, angles, plain=None):
        """`plain`, a boolean scalar: whether this layer goes without its own scale and soft cap.

        None: it does not, and what it would do otherwise is not compiled.
        """
        both = {"init": _INIT, "dtype": self.dtype}
        width = x_BTD.shape[-1]

        def norm(name, x):
            return layers.RMSNorm(self.norm_eps, self.norm_offset, name=name)(x)

        def after(name, x):
            return norm(name, x).astype(self.dtype) if self.post_norms else x

        q_BTNH, k_BTKH, v_BTKH = layers.QKV(
            self.num_heads, self.num_kv_heads, self.head_width, name="attention", **both
        )(norm("attention_norm", x_BTD))
        if self.qk_norm:
            q_BTNH = norm("q_norm", q_BTNH).astype(self.dtype)
            k_BTKH = norm("k_norm", k_BTKH).astype(self.dtype)
        operands = rotate(q_BTNH, angles), rotate(k_BTKH, angles), v_BTKH, mask_BT
        a_BTNH = self.causal_attention(operands, plain)
        h_BTD = layers.output_projection(a_BTNH, width, name="attention_out", **both)
        x_BTD = x_BTD + after("attention_post_norm", h_BTD)
        mlp = layers.GatedMLP(width, self.mlp_width, activation=self.activation, name="mlp", **both)
        x_BTD = x_BTD + after("mlp_post_norm", mlp(norm("mlp_norm", x_BTD)))
        return constrain(x_BTD, "batch", "text", None), (k_BTKH, v_BTKH)

    def causal_attention(self, operands, plain):
        """`attend` on its operands, with this layer's scale and soft cap unless it is plain."""
        scale = (self.query_scalar or self.head_width) ** -0.5
        causally = functools.partial(attend, causal=True, kernel=self.kernel)
        own = functools.partial(causally, scale=scale, softcap=self.softcap)
        if plain is None:
            return own(*operands)
        plainly = functools.partial(causally, scale=self.head_width**-0.5)
        return jax.lax.cond(plain, plainly, own, *operands)


class LLM(nn.Module):
    """(B, T) token ids, right-padded, and their mask -> TextFeatures.

    The fields are the keys of the config's section `llm`, which says what they mean, except these:

      num_plain: how many layers, the last ones, attend without `query_scalar` and `softcap`.
      kernel: of attention, of `attention.KERNELS`.
      dtype: of the computation.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    norm_offset: float = 1.0
    activation: str = "gelu"
    scale_embedding: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    query_scalar: float = 0.0
    softcap: float = 0.0
    logit_softcap: float = 0.0
    max_tokens: int = 8192
    unroll: int = 1
    num_plain: int = 0
    kernel: str = "auto"
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        self.embed = layers.Embed(self.vocab_size, self.width, self.dtype)
        own = self.num_plain < self.num_layers
        axes = (nn.broadcast,) * 2 + (0,) * len(self._flags())
        self.blocks = layers.scan_layers(LLMBlock, self.num_layers, axes, self.unroll)(
            self.num_heads,
            self.num_kv_heads,
            self.head_width,
            self.mlp_width,
            self.norm_eps,
            self.dtype,
            activation=self.activation,
            norm_offset=self.norm_offset,
            post_norms=self.post_norms,
            qk_norm=self.qk_norm,
            query_scalar=self.query_scalar if own else 0.0,
            softcap=self.softcap if own else 0.0,
            kernel=self.kernel,
        )
        self.final_norm = layers.RMSNorm(self.norm_eps, self.norm_offset)

    def _flags(self) -> tuple[jax.Array, ...]:
        """(Which layers are plain,) where some are, others not, and it makes a difference."""
        differs = self.softcap or (self.query_scalar or self.head_width) != self.head_width
        if not differs or not 0 < self.num_plain < self.num_layers:
            return ()
        return (jnp.arange(self.num_layers) >= self.num_layers - self.num_plain,)

    def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> TextFeatures:
        """Reads the prompts; padding (mask False) is seen by no real token.

        Raises ValueError where T is more than `max_tokens`.
        """
        chex.assert_rank([ids_BT, mask_BT], 2)
        chex.assert_equal_shape([ids_BT, mask_BT])
        length = ids_BT.shape[1]
        if length > self.max_tokens:
            raise ValueError(
                f"A text of {length} tokens is longer than llm.max_tokens = {self.max_tokens}, "
                "up to which this language model is what was published; cut it."
            )
        mask_BT = mask_BT.astype(bool)
        x_BTD = self.embed.encode(ids_BT)
        if self.scale_embedding:
            x_BTD = x_BTD * jnp.asarray(self.width**0.5, self.dtype)
        x_BTD = constrain(x_BTD, "batch", "text", None)
        angles = text_angles(length, self.head_width, self.rope_theta)
        x_BTD, (k_LBTKH, v_LBTKH) = self.blocks(x_BTD, mask_BT, angles, *self._flags())
        hidden_BTD = self.final_norm(x_BTD).astype(self.dtype)
        return TextFeatures(k_LBTKH, v_LBTKH, hidden_BTD, mask_BT)

    def logits(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Next-token logits (B, T, V), float32."""
        return soft_cap(self.embed.decode(self(ids_BT, mask_BT).hidden_BTD), self.logit_softcap)


def from_config(
    llm: Mapping[str, Any], num_shared: int = 0, dtype: Any = jnp.float32, kernel: str = "auto"
) -> LLM:
    """The language model of a config's section, of which a DiT shares the last `num_shared` layers.

    In the published models those attend plainly, whatever the language model is: the section's
    `softcap_shared` lets them keep their own scale and soft cap. Raises TypeError for an unknown
    key.
    """
    fields = dict(llm)
    own = fields.pop("softcap_shared", False)
    return LLM(**fields, num_plain=0 if own else num_shared, dtype=dtype, kernel=kernel)
