"""CLIP's two encoders with their projections, prompt or picture -> one embedding of the whole.

Radford et al., arXiv 2103.00020, as transformers' CLIPModel has it. Text: token ids, pre-norm
blocks under a causal mask, the final state at the first end-of-text token, projected. The padding
behind that token is not masked, for the causal mask hides it from all that is read. Image: patches
behind a class token, a norm, the same blocks without a mask, the class token's final state,
projected.

Shape letters as in layers.py, H and W rows and columns of pixels; P projection width.
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
    """Pre-norm attention and MLP, all with biases."""

    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    dtype: layers.Dtype
    causal: bool

    @nn.compact
    def __call__(self, x_BTD):
        width = x_BTD.shape[-1]
        head_width = width // self.num_heads
        both = {"bias": True, "init": _INIT, "dtype": self.dtype}

        def heads(name):
            shape, axes = (width, self.num_heads, head_width), ("embed", "heads", "head")
            return layers.Einsum("BTD,DNH->BTNH", shape, axes, name=name, **both)(h_BTD)

        h_BTD = LayerNorm(self.norm_eps, name="attention_norm")(x_BTD)
        options = {"scale": head_width**-0.5, "causal": self.causal}
        a_BTNH = attend(heads("q"), heads("k"), heads("v"), **options)
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
        _check(self)
        self.embed = layers.Embed(self.vocab_size, self.width, self.dtype)
        table = with_axes(nn.initializers.normal(0.01), (None, "embed"))
        self.positions = self.param("positions", table, (self.max_tokens, self.width))
        self.blocks = _blocks(self, causal=True)
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


class CLIPVision(nn.Module):
    """(B, H, W, 3) normalised pixels, H = W = image_size -> embeddings (B, P), float32."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    projection_width: int = 512  # P
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        _check(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"{self.image_size} pixels are no patches of {self.patch_size}.")
        self.side = self.image_size // self.patch_size
        shape = (self.patch_size, self.patch_size, 3, self.width)
        axes = (None, None, None, "embed")
        both = {"init": _INIT, "dtype": self.dtype}
        self.patches = layers.Einsum("BIPQC,PQCD->BID", shape, axes, **both)
        table = with_axes(nn.initializers.normal(0.01), (None, "embed"))
        self.positions = self.param("positions", table, (1 + self.side**2, self.width))
        normal = with_axes(nn.initializers.normal(0.01), ("norm",))
        self.class_token = self.param("class_token", normal, (self.width,))
        self.first_norm = LayerNorm(self.norm_eps)
        self.blocks = _blocks(self, causal=False)
        self.final_norm = LayerNorm(self.norm_eps)
        shape, axes = (self.width, self.projection_width), ("embed", None)
        self.projection = layers.Einsum("BD,DP->BP", shape, axes, **both)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Reads the pictures."""
        chex.assert_shape(images_BHWC, (None, self.image_size, self.image_size, 3))
        batch, side, patch = len(images_BHWC), self.side, self.patch_size
        x = images_BHWC.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        x_BID = self.patches(x.reshape(batch, side**2, patch, patch, 3))
        first_B1D = jnp.broadcast_to(self.class_token.astype(self.dtype), (batch, 1, self.width))
        x_BID = jnp.concatenate([first_B1D, x_BID], axis=1) + self.positions.astype(self.dtype)
        x_BID = constrain(self.first_norm(x_BID).astype(self.dtype), "batch", "image", None)
        x_BID, _ = self.blocks(x_BID)
        return self.projection(self.final_norm(x_BID[:, 0])).astype(jnp.float32)


def _check(encoder: CLIPText | CLIPVision) -> None:
    if encoder.width % encoder.num_heads:
        raise ValueError(f"width {encoder.width} must be a multiple of {encoder.num_heads} heads.")
    if encoder.activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {encoder.activation!r}; known: {list(ACTIVATIONS)}.")


def _blocks(encoder: CLIPText | CLIPVision, *, causal: bool) -> nn.Module:
    fields = ("num_heads", "mlp_width", "activation", "norm_eps", "dtype")
    options = {name: getattr(encoder, name) for name in fields}
    return layers.scan_layers(CLIPBlock, encoder.num_layers, ())(**options, causal=causal)
