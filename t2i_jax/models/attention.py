"""Attention: one entry point for every network here."""

import chex
import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap): x where it is small, never beyond the cap. A cap of 0 is none."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    q_BINH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(scale q k^T) v with grouped heads: N / K query heads share a key/value head.

    Args:
      q_BINH: queries (B, I, N, H).
      k_BSKH: keys (B, S, K, H).
      v_BSKH: values (B, S, K, H).
      mask: boolean, True = may be seen; (B, S) by key, or (B, I, S) by query and key.
      scale: factor on the scores.
      softcap: bound of the scaled scores (Gemma 2, arXiv 2408.00118, section 2); 0 = none.

    Returns:
      (B, I, N, H), in the dtype of the queries; the softmax is taken in float32. A query that
      may see nothing gets the mean of the values: mask what follows from it.
    """
    chex.assert_rank([q_BINH, k_BSKH, v_BSKH], 4)
    chex.assert_equal_shape([k_BSKH, v_BSKH])
    batch, queries, heads, width = q_BINH.shape
    kv_heads = k_BSKH.shape[2]
    q_BIKGH = q_BINH.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BIKGH,BSKH->BKGIS", q_BIKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, softcap)
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGIS,BSKH->BIKGH", weights, v_BSKH)
    return out.reshape(batch, queries, heads, width).astype(q_BINH.dtype)
