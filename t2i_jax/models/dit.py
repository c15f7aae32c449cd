"""The diffusion transformer: noisy latents, a time and a text memory -> velocity.

One network for the whole family. Where the text's keys and values come from is the memory's affair
(memory.py); `attention` says how they are attended to, `conditioning` how the time enters
(conditioning.py), `positions` and the table where an image token is (positions.py).
Shape letters as in layers.py; C latent channels, P patch size, I = (height / P) (width / P).
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2i_jax.models import conditioning, layers
from t2i_jax.models.attention import attend
from t2i_jax.models.memory import TextMemory
from t2i_jax.models.positions import absolute_table, image_angles, rotate
from t2i_jax.sharding import constrain

ATTENTIONS = ("joint", "cross")
PREDICTIONS = ("velocity", "data")
_SMALLEST_TIME = 0.05  # below it, (z - x) / t would magnify what is left of the error


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> (B, I, P, P, C), the tokens row by row."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch, patch, channels)


def unpatchify(x_BIPPC: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B, I, P, P, C) -> (B, H, W, C) of grid = (rows, columns) of tokens."""
    batch, _, patch, _, channels = x_BIPPC.shape
    x = x_BIPPC.reshape(batch, *grid, patch, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, grid[0] * patch, grid[1] * patch, channels)


class Text(NamedTuple):
    """What one block sees of the prompt."""

    keys_BTKH: jax.Array
    values_BTKH: jax.Array
    mask_BT: jax.Array


class DiTBlock(nn.Module):
    """Attention among the image tokens and to the text, and a gated MLP.

    The text is a layer of a `TextMemory`; whose keys and values these are is not known here.
    'joint' attention is one softmax over [text; image], 'cross' is an attention to the image, then
    one to the text.
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    attention: str
    conditioning: str
    qk_norm: bool
    normalise_text: bool  # the text's keys pass through the key norm, too
    sandwich_norm: bool
    norm_eps: float
    dtype: layers.Dtype
    softcap: float = 0.0
    query_scalar: float = 0.0
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x_BID, text, condition, mask_BT, angles):
        """`text` is this layer's (keys, values, whether they are seen)."""
        keys_BTKH, values_BTKH, seen = text
        text = Text(keys_BTKH.astype(self.dtype), values_BTKH.astype(self.dtype), mask_BT & seen)
        modulation = conditioning.find(self.conditioning).block
        affines = modulation(name="modulation")(condition) if modulation else (None, None)

        h_BID = self.enter("attention_norm", x_BID, affines[0])
        if self.attention == "joint":
            h_BID = self.attend_jointly(h_BID, text, angles)
        else:
            h_BID = self.attend_to_image(h_BID, angles)
        x_BID = self.leave("attention_post_norm", x_BID, h_BID, affines[0])

        if self.attention == "cross":  # as published: no norm before it, no gate after it
            h_BID = self.attend_to_text(x_BID, text)
            x_BID = self.leave("cross_post_norm", x_BID, jnp.where(seen, h_BID, 0), None)

        h_BID = self.enter("mlp_norm", x_BID, affines[1])
        mlp = layers.GatedMLP(x_BID.shape[-1], self.mlp_width, dtype=self.dtype, name="mlp")
        h_BID = checkpoint_name(mlp(h_BID), "mlp")
        x_BID = self.leave("mlp_post_norm", x_BID, h_BID, affines[1])
        return constrain(x_BID, "batch", "image", None), None

    def enter(self, name, x_BID, affine: conditioning.Affine | None):
        """norm(x), modulated: the input of a sublayer."""
        h_BID = layers.RMSNorm(self.norm_eps, name=name)(x_BID)
        if affine is not None:
            h_BID = conditioning.modulate(h_BID, affine.shift, affine.scale)
        return h_BID.astype(self.dtype)

    def leave(self, name, x_BID, h_BID, affine: conditioning.Affine | None):
        """x + gate h, h the output of a sublayer; normalised first in a sandwich. In float32."""
        if self.sandwich_norm:
            h_BID = layers.RMSNorm(self.norm_eps, name=name)(h_BID)
        h_BID = h_BID.astype(jnp.float32)
        if affine is not None:
            h_BID = affine.gate * h_BID
        return (x_BID + h_BID).astype(self.dtype)

    def attend_jointly(self, h_BID, text: "Text", angles):
        """One softmax over the text's keys, as they come, and the image's own."""
        q_BINH, k_BIKH, v_BIKH, key_norm = self.project(h_BID, angles)
        text_k_BTKH = key_norm(text.keys_BTKH) if self.normalise_text else text.keys_BTKH
        a_BINH = attend(
            q_BINH,
            jnp.concatenate([text_k_BTKH, k_BIKH], axis=1),
            jnp.concatenate([text.values_BTKH, v_BIKH], axis=1),
            jnp.concatenate([text.mask_BT, jnp.ones(h_BID.shape[:2], bool)], axis=1),
            scale=(self.query_scalar or self.head_width) ** -0.5,
            softcap=self.softcap,
            kernel=self.kernel,
        )
        return self.output(a_BINH, h_BID.shape[-1], "attention_out")

    def attend_to_image(self, h_BID, angles):
        """The image tokens among themselves."""
        q_BINH, k_BIKH, v_BIKH, _ = self.project(h_BID, angles)
        a_BINH = attend(q_BINH, k_BIKH, v_BIKH, scale=self.head_width**-0.5, kernel=self.kernel)
        return self.output(a_BINH, h_BID.shape[-1], "attention_out")

    def attend_to_text(self, x_BID, text: "Text"):
        """Queries of the image, keys and values of the text; none of them is turned."""
        sizes = (self.num_heads, self.head_width)
        q_BINH = layers.query_projection(x_BID, *sizes, "cross_q", dtype=self.dtype)
        q_BINH = self.head_norm("cross_q_norm")(q_BINH)
        keys_BTKH = text.keys_BTKH
        if self.normalise_text:
            keys_BTKH = self.head_norm("cross_k_norm")(keys_BTKH)
        a_BINH = attend(
            q_BINH,
            keys_BTKH,
            text.values_BTKH,
            text.mask_BT,
            scale=(self.query_scalar or self.head_width) ** -0.5,
            softcap=self.softcap,
            kernel=self.kernel,
        )
        return self.output(a_BINH, x_BID.shape[-1], "cross_out")

    def project(self, h_BID, angles):
        """Queries, keys and values of the image, and the norm that keys go through."""
        q_BINH, k_BIKH, v_BIKH = layers.QKV(
            self.num_heads, self.num_kv_heads, self.head_width, dtype=self.dtype, name="attention"
        )(h_BID)
        key_norm = self.head_norm("k_norm")
        q_BINH, k_BIKH = self.head_norm("q_norm")(q_BINH), key_norm(k_BIKH)
        return rotate(q_BINH, angles), rotate(k_BIKH, angles), v_BIKH, key_norm

    def head_norm(self, name: str):
        """The norm over a head of queries or keys, or nothing where the model has none."""
        if not self.qk_norm:
            return lambda x: x
        norm = layers.RMSNorm(self.norm_eps, name=name)
        return lambda x: norm(x).astype(self.dtype)

    def output(self, a_BINH, width, name):
        """(B, I, N, H) -> (B, I, D)."""
        return layers.output_projection(a_BINH, width, name, dtype=self.dtype)


class DiT(nn.Module):
    """(B, H, W, C) latents at times t, a memory of `num_layers` layers -> velocity (B, H, W, C).

    With prediction 'data' the network's output is an estimate x of the data, and the velocity is
    (z - x) / t: images lie near a surface of few dimensions, noise does not, and so a narrow
    network need not carry the noise to its output (Li and He, arXiv 2511.13720). Below t = 0.05 the
    divisor stays there, so that an error is not magnified without bound.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    channels: int
    patch_size: int = 2
    attention: str = "joint"
    positions: str = "2d-rope"
    table_size: int = 0
    table_range: float = 16.0
    conditioning: str = "adaln-zero"
    pooled_width: int = 0
    time_scale: float = 1000.0  # the network sees time_scale * t
    normalise_text: bool = False
    softcap: float = 0.0  # of attention to the text, where the LLM's own is applied there, too
    query_scalar: float = 0.0  # likewise
    prediction: str = "velocity"
    qk_norm: bool = True
    sandwich_norm: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1
    kernel: str = "auto"  # of attention
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        for name, known in (("attention", ATTENTIONS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; known: {known}.")
        how = conditioning.find(self.conditioning)
        if self.pooled_width and not how.embedded:
            raise ValueError(
                f"pooled_width {self.pooled_width} needs a conditioning that embeds the time, to "
                f"which it is added, not {self.conditioning!r}."
            )
        patch, size, axis = self.patch_size, self.channels, "patch"
        self.patch_embed = layers.Einsum(
            "BIpqC,pqCD->BID",
            (patch, patch, size, self.width),
            (axis, axis, axis, "embed"),
            bias=True,
            dtype=self.dtype,
        )
        if how.embedded:
            self.time_embed = conditioning.TimeEmbedding(
                self.width, self.pooled_width, self.norm_eps
            )
        if how.shared:
            self.shared_modulation = how.shared()
        if how.final:
            self.final_modulation = how.final()
        block = layers.remat(DiTBlock, self.remat)
        shared = (nn.broadcast,) * 3
        self.blocks = layers.scan_layers(block, self.num_layers, (0, *shared), self.unroll)(
            self.num_heads,
            self.num_kv_heads,
            self.head_width,
            self.mlp_width,
            self.attention,
            self.conditioning,
            self.qk_norm,
            self.normalise_text,
            self.sandwich_norm,
            self.norm_eps,
            self.dtype,
            self.softcap,
            self.query_scalar,
            self.kernel,
        )
        self.final_norm = layers.RMSNorm(self.norm_eps)
        self.out = layers.Einsum(
            "BID,DpqC->BIpqC",
            (self.width, patch, patch, size),
            ("embed", axis, axis, axis),
            bias=True,
            init=layers.fixed(layers.zeros),
            dtype=self.dtype,
        )

    def __call__(self, z_BHWC: jax.Array, t_B: jax.Array, memory: TextMemory) -> jax.Array:
        """Velocity, float32. Raises ValueError where the patch does not divide the latents."""
        batch, height, width, channels = z_BHWC.shape
        chex.assert_shape(t_B, (batch,))
        chex.assert_shape(memory.mask_BT, (batch, None))
        patch = self.patch_size
        if height % patch or width % patch or channels != self.channels:
            raise ValueError(
                f"Latents of shape {z_BHWC.shape}: height and width must be multiples of the patch "
                f"size {patch}, channels must be {self.channels}."
            )
        grid = (height // patch, width // patch)
        how = conditioning.find(self.conditioning)
        x_BID = self.patch_embed(patchify(z_BHWC, patch))
        if self.table_size:
            x_BID = x_BID + absolute_table(grid, self.width, self.table_size, self.table_range)
        time_BD = None
        if how.embedded:
            time_BD = self.time_embed(self.time_scale * t_B, memory.pooled_BP)
        condition = self.shared_modulation(time_BD) if how.shared else time_BD
        if how.added:
            x_BID = x_BID + time_BD[:, None]
        x_BID = constrain(x_BID.astype(self.dtype), "batch", "image", None)

        angles = image_angles(
            self.positions, grid, memory.start_B, self.head_width, self.rope_theta
        )
        text = (memory.keys_LBTKH, memory.values_LBTKH, memory.seen_L)
        x_BID, _ = self.blocks(x_BID, text, condition, memory.mask_BT, angles)

        x_BID = self.final_norm(x_BID)
        if how.final:
            x_BID = self.final_modulation(x_BID, time_BD)
        output = unpatchify(self.out(x_BID), grid).astype(jnp.float32)
        if self.prediction == "velocity":
            return output
        t = jnp.maximum(t_B, _SMALLEST_TIME)[:, None, None, None]
        return (z_BHWC.astype(jnp.float32) - output) / t
