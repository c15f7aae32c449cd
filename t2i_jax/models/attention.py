"""Attention: one entry point for every network here.

    softmax(scale q k^T) v,  N / K query heads sharing a key/value head

What computes it is chosen by the devices that the program is made for (`kernel="auto"`):

    xla      scores as an array: any device, any shape
    splash   on TPU: blocks of scores in fast memory, never in HBM (attention_tpu.py)
    cudnn    on NVIDIA GPUs: the same (attention_gpu.py)

All agree within the rounding of their dtype, gradients included.
"""

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2i_jax import sharding
from t2i_jax.models import attention_gpu, attention_tpu
from t2i_jax.models.attention_tpu import RESIDUALS

KERNELS = ("auto", "xla", "splash", "cudnn")


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap): x where it is small, never beyond the cap. A cap of 0 is none."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    q_BINH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BS: jax.Array | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float = 0.0,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(scale q k^T) v with grouped heads: N / K query heads share a key/value head.

    Args:
      q_BINH: queries (B, I, N, H).
      k_BSKH: keys (B, S, K, H).
      v_BSKH: values (B, S, K, H).
      mask_BS: boolean, True = a key that may be seen.
      scale: factor on the scores.
      causal: query i sees the keys up to i alone; I = S.
      softcap: bound of the scaled scores (Gemma 2, arXiv 2408.00118, section 2); 0 = none.
      kernel: of KERNELS; 'auto' takes what suits the devices and the shapes.

    Returns:
      (B, I, N, H), in the dtype of the queries; the softmax is taken in float32. A query that
      may see nothing gets finite numbers that mean nothing: mask what follows from it.

    Raises ValueError for an unknown kernel, and for one that cannot do this.
    """
    chex.assert_rank([q_BINH, k_BSKH, v_BSKH], 4)
    chex.assert_equal_shape([k_BSKH, v_BSKH])
    if mask_BS is not None:
        chex.assert_shape(mask_BS, k_BSKH.shape[:2])
    if causal:
        chex.assert_equal(q_BINH.shape[1], k_BSKH.shape[1])
    if kernel not in KERNELS:
        raise ValueError(f"Unknown attention kernel {kernel!r}; known: {KERNELS}.")
    if kernel == "auto":
        kernel = _suited(q_BINH, k_BSKH, softcap)
    options = {"scale": scale, "causal": causal, "softcap": softcap}
    if kernel == "splash":
        return attention_tpu.attend(q_BINH, k_BSKH, v_BSKH, mask_BS, **options)
    if kernel == "cudnn":
        return attention_gpu.attend(q_BINH, k_BSKH, v_BSKH, mask_BS, **options)
    return checkpoint_name(_attend(q_BINH, k_BSKH, v_BSKH, mask_BS, **options), RESIDUALS)


def _suited(q_BINH: jax.Array, k_BSKH: jax.Array, softcap: float) -> str:
    platform, _ = sharding.device()
    if platform == "tpu" and attention_tpu.suits(q_BINH, k_BSKH):
        return "splash"
    if platform == "gpu" and attention_gpu.suits(q_BINH, softcap):
        return "cudnn"
    return "xla"


def _attend(q_BINH, k_BSKH, v_BSKH, mask_BS, *, scale, causal, softcap) -> jax.Array:
    """The scores as one array (B, K, N / K, I, S), float32."""
    batch, queries, heads, width = q_BINH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    q_BIKGH = q_BINH.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BIKGH,BSKH->BKGIS", q_BIKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, softcap)
    seen = None if mask_BS is None else mask_BS[:, None]
    if causal:
        past_IS = jnp.tril(jnp.ones((queries, keys), bool))
        seen = past_IS[None] if seen is None else past_IS & seen
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGIS,BSKH->BIKGH", weights, v_BSKH)
    return out.reshape(batch, queries, heads, width).astype(q_BINH.dtype)
