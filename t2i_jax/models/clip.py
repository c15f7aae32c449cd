"""CLIP's text encoder with its projection: token ids -> one embedding of the whole prompt.

Radford et al., arXiv 2103.00020, as transformers' CLIPTextModelWithProjection has it: pre-norm
blocks under a causal mask, the final state at the first end-of-text token, projected. The padding
behind that token is not masked, for the causal mask hides it from all that is read.

Shape letters as in layers.py; P projection width.
"""

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.attention import attend
from t2i_jax.sharding import constrain, with_axes

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP L's
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # OpenCLIP's
}
# What config.json says of CLIPs from before transformers' pull request 24773, SD3's among them;
# their end-of-text token is the last one of the vocabulary.
LAST_TOKEN = 2

_INIT = layers.fixed(nn.initializers.normal(0.02))


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last axis, in float32. Returns float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", with_axes(nn.initializers.ones, ("norm",)), x.shape[-1:])
        bias = self.param("bias", with_axes(layers.zeros, ("norm",)), x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * weight.astype(jnp.float32) + bias.astype(jnp.float32)


class CLIPBlock(nn.Module):
    """Pre-norm causal attention and MLP, all with biases."""

    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x_BTD):
        width = x_BTD.shape[-1]
        head_width = width // self.num_heads
        both = {"bias": True, "init": _INIT, "dtype": self.dtype}

        def heads(name):
            shape, axes = (width, self.num_heads, head_width), ("embed", "heads", "head")
            return layers.Einsum("BTD,DNH->BTNH", shape, axes, name=name, **both)(h_BTD)

        h_BTD = LayerNorm(self.norm_eps, name="attention_norm")(x_BTD)
        a_BTNH = attend(heads("q"), heads("k"), heads("v"), scale=head_width**-0.5, causal=True)
        shape, axes = (self.num_heads, head_width, width), ("heads", "head", "embed")
        x_BTD += layers.Einsum("BTNH,NHD->BTD", shape, axes, name="attention_out", **both)(a_BTNH)

        h_BTD = LayerNorm(self.norm_eps, name="mlp_norm")(x_BTD)
        shape, axes = (width, self.mlp_width), ("embed", "mlp")
        h_BTF = layers.Einsum("BTD,DF->BTF", shape, axes, name="mlp_up", **both)(h_BTD)
        h_BTF = ACTIVATIONS[self.activation](h_BTF)
        shape, axes = (self.mlp_width, width), ("mlp", "embed")
        x_BTD += layers.Einsum("BTF,FD->BTD", shape, axes, name="mlp_down", **both)(h_BTF)
        return constrain(x_BTD, "batch", "text", None), None


class CLIPText(nn.Module):
    """(B, T) token ids, T <= max_tokens -> pooled embeddings (B, P), float32.

    The end-of-text token is the first one equal to `eos_id`, or, where that is 2, the first one of
    the largest id (see LAST_TOKEN); the first token of a row that has none.
    """

    vocab_size: int = 49_408
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_tokens: int = 77
    projection_width: int = 768  # P; 0: there is no projection, and P is the width
    activation: str = "quick_gelu"
    eos_id: int = LAST_TOKEN
    norm_eps: float = 1e-5
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of {self.num_heads} heads.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}; known: {list(ACTIVATIONS)}.")
        self.embed = layers.Embed(self.vocab_size, self.width, self.dtype)
        table = with_axes(nn.initializers.normal(0.01), (None, "embed"))
        self.positions = self.param("positions", table, (self.max_tokens, self.width))
        self.blocks = layers.scan_layers(CLIPBlock, self.num_layers, ())(
            self.num_heads, self.mlp_width, self.activation, self.norm_eps, self.dtype
        )
        self.final_norm = LayerNorm(self.norm_eps)
        if self.projection_width:
            shape, axes = (self.width, self.projection_width), ("embed", None)
            self.projection = layers.Einsum("BD,DP->BP", shape, axes, init=_INIT, dtype=self.dtype)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Reads the prompts. Raises ValueError for more tokens than there are positions."""
        chex.assert_rank(ids_BT, 2)
        length = ids_BT.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"{length} tokens, but CLIP has {self.max_tokens} positions.")
        x_BTD = self.embed.encode(ids_BT) + self.positions[:length].astype(self.dtype)
        x_BTD = constrain(x_BTD, "batch", "text", None)
        x_BTD, _ = self.blocks(x_BTD)
        last = ids_BT if self.eos_id == LAST_TOKEN else ids_BT == self.eos_id
        end_B11 = jnp.argmax(last, axis=1)[:, None, None]
        x_BD = jnp.take_along_axis(x_BTD, end_B11, axis=1)[:, 0]
        x_BD = self.final_norm(x_BD)
        return (self.projection(x_BD) if self.projection_width else x_BD).astype(jnp.float32)
