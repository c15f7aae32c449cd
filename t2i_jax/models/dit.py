"""The diffusion transformer: noisy latents, a timestep and a text memory -> velocity.

One network for the whole family. What the text is (`TextMemory`) and how it is attended to is
decided outside of the block; how the timestep enters is decided by `conditioning`.
Shape letters as in layers.py; C latent channels, P patch size, I = (height / P) (width / P).
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.attention import attend
from t2i_jax.models.memory import TextMemory
from t2i_jax.models.positions import absolute_table, image_angles, rotate
from t2i_jax.sharding import constrain

CONDITIONING = ("adaln-zero", "none")
PREDICTIONS = ("velocity", "data")
_SMALLEST_TIME = 0.05  # below it, (z - x) / t would magnify what is left of the error
_TIME_FEATURES = 256  # width of the sinusoidal timestep embedding


def timestep_features(t_B: jax.Array, width: int = _TIME_FEATURES) -> jax.Array:
    """[cos, sin] of 1000 t at `width`/2 frequencies from 1 down to 1/10000; (B,) -> (B, width)."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t_B.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer SiLU network on the sinusoidal features: (B,) -> (B, D)."""

    width: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, t_B: jax.Array) -> jax.Array:
        both = {
            "bias": True,
            "init": layers.fixed(nn.initializers.normal(0.02)),
            "dtype": self.dtype,
        }
        x = timestep_features(t_B)
        shape, axes = (_TIME_FEATURES, self.width), (None, "embed")
        x = layers.Einsum("BE,ED->BD", shape, axes, name="hidden", **both)(x)
        shape, axes = (self.width, self.width), ("embed", "modulation")
        return layers.Einsum("BE,ED->BD", shape, axes, name="out", **both)(jax.nn.silu(x))


class Modulation(nn.Module):
    """AdaLN-Zero: `count` vectors (B, 1, D) of the timestep, zero at first (arXiv 2212.09748).

    Returns float32.
    """

    count: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, time_BD: jax.Array) -> list[jax.Array]:
        width = time_BD.shape[-1]
        out = layers.Einsum(
            "BE,EMD->BMD",
            (width, self.count, width),
            ("embed", "modulation", "modulation"),
            bias=True,
            init=layers.fixed(layers.zeros),
            dtype=self.dtype,
            name="linear",
        )(jax.nn.silu(time_BD))
        return jnp.split(out.astype(jnp.float32), self.count, axis=1)


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


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


class DiTBlock(nn.Module):
    """Attention over [text memory; image] and a gated MLP, modulated by the timestep."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    conditioning: str
    qk_norm: bool
    sandwich_norm: bool
    norm_eps: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x_BID, memory, time_BD, mask_BT, angles):
        """`memory` is this layer's (keys, values), each (B, T, K, H)."""
        width = x_BID.shape[-1]

        def norm(name, x):
            return layers.RMSNorm(self.norm_eps, name=name)(x)

        def after(name, x):  # the second norm of a sandwich
            return norm(name, x).astype(self.dtype) if self.sandwich_norm else x

        modulated = self.conditioning == "adaln-zero"
        if modulated:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = Modulation(
                6, self.dtype, name="modulation"
            )(time_BD)

        h_BID = norm("attention_norm", x_BID)
        h_BID = modulate(h_BID, shift_a, scale_a) if modulated else h_BID
        h_BID = self.joint_attention(h_BID.astype(self.dtype), memory, mask_BT, angles)
        h_BID = layers.output_projection(h_BID, width, dtype=self.dtype, name="attention_out")
        h_BID = after("attention_post_norm", h_BID)
        x_BID = x_BID + (gate_a.astype(self.dtype) * h_BID if modulated else h_BID)

        h_BID = norm("mlp_norm", x_BID)
        h_BID = modulate(h_BID, shift_m, scale_m) if modulated else h_BID
        mlp = layers.GatedMLP(width, self.mlp_width, dtype=self.dtype, name="mlp")
        h_BID = after("mlp_post_norm", mlp(h_BID.astype(self.dtype)))
        x_BID = x_BID + (gate_m.astype(self.dtype) * h_BID if modulated else h_BID)
        return constrain(x_BID, "batch", "image", None), None

    def joint_attention(self, h_BID, memory, mask_BT, angles):
        """One softmax over the text's keys, as they come, and the image's own."""
        q_BINH, k_BIKH, v_BIKH = layers.QKV(
            self.num_heads, self.num_kv_heads, self.head_width, dtype=self.dtype, name="attention"
        )(h_BID)
        if self.qk_norm:
            q_BINH = layers.RMSNorm(self.norm_eps, name="q_norm")(q_BINH).astype(self.dtype)
            k_BIKH = layers.RMSNorm(self.norm_eps, name="k_norm")(k_BIKH).astype(self.dtype)
        q_BINH, k_BIKH = rotate(q_BINH, angles), rotate(k_BIKH, angles)
        text_k, text_v = (part.astype(self.dtype) for part in memory)
        mask_BI = jnp.ones(h_BID.shape[:2], bool)
        return attend(
            q_BINH,
            jnp.concatenate([text_k, k_BIKH], axis=1),
            jnp.concatenate([text_v, v_BIKH], axis=1),
            jnp.concatenate([mask_BT, mask_BI], axis=1),
            scale=self.head_width**-0.5,
        )


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
    positions: str = "2d-rope"
    table_size: int = 0
    table_range: float = 16.0
    conditioning: str = "adaln-zero"
    pooled_width: int = 0
    prediction: str = "velocity"
    qk_norm: bool = True
    sandwich_norm: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"Unknown conditioning {self.conditioning!r}; known: {CONDITIONING}.")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"Unknown prediction {self.prediction!r}; known: {PREDICTIONS}.")
        patch, size, axis = self.patch_size, self.channels, "patch"
        self.patch_embed = layers.Einsum(
            "BIpqC,pqCD->BID",
            (patch, patch, size, self.width),
            (axis, axis, axis, "embed"),
            bias=True,
            dtype=self.dtype,
        )
        if self.conditioning == "adaln-zero":
            self.time_embed = TimestepEmbedding(self.width, self.dtype)
            self.final_modulation = Modulation(2, self.dtype)
        block = layers.remat(DiTBlock, self.remat)
        shared = (nn.broadcast,) * 3
        self.blocks = layers.scan_layers(block, self.num_layers, (0, *shared), self.unroll)(
            self.num_heads,
            self.num_kv_heads,
            self.head_width,
            self.mlp_width,
            self.conditioning,
            self.qk_norm,
            self.sandwich_norm,
            self.norm_eps,
            self.dtype,
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
        x_BID = self.patch_embed(patchify(z_BHWC, patch))
        if self.table_size:
            table_ID = absolute_table(grid, self.width, self.table_size, self.table_range)
            x_BID = (x_BID + table_ID).astype(self.dtype)
        x_BID = constrain(x_BID, "batch", "image", None)

        modulated = self.conditioning == "adaln-zero"
        time_BD = self.time_embed(t_B) if modulated else None
        angles = image_angles(
            self.positions, grid, memory.length_B, self.head_width, self.rope_theta
        )
        layer_memory = (memory.keys_LBTKH, memory.values_LBTKH)
        x_BID, _ = self.blocks(x_BID, layer_memory, time_BD, memory.mask_BT, angles)

        x_BID = self.final_norm(x_BID)
        if modulated:
            scale, shift = self.final_modulation(time_BD)
            x_BID = modulate(x_BID, shift, scale)
        output = unpatchify(self.out(x_BID), grid).astype(jnp.float32)
        if self.prediction == "velocity":
            return output
        t = jnp.maximum(t_B, _SMALLEST_TIME)[:, None, None, None]
        return (z_BHWC.astype(jnp.float32) - output) / t
