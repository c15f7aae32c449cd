"""Attention on NVIDIA GPUs: cuDNN's fused kernel, by way of jax.nn.dot_product_attention.

The kernel knows padding as lengths: of every row the first keys are seen, the rest are not. Which
keys come first makes no difference to a softmax over all of them, so those that are seen are
brought to the front; a mask of (queries x keys) would be read from memory in every layer.
"""

import jax
import jax.numpy as jnp

from t2i_jax import sharding

_WIDEST = 128  # of a head; 256 from Hopper on
_HOPPER = ("H100", "H200", "GH200", "B100", "B200", "GB200")


def suits(q_BINH: jax.Array, softcap: float) -> bool:
    """Whether cuDNN has a kernel for it: half precision, heads of a width it knows, no soft cap."""
    width, half = q_BINH.shape[3], q_BINH.dtype in (jnp.bfloat16, jnp.float16)
    return half and not softcap and width % 8 == 0 and width <= _widest()


def _widest() -> int:
    _, kind = sharding.device()
    return 256 if any(name in kind for name in _HOPPER) else _WIDEST


def attend(q_BINH, k_BSKH, v_BSKH, mask_BS, *, scale, causal, softcap) -> jax.Array:
    """As `attention.attend`. Raises ValueError for a soft cap, which cuDNN's kernel has not."""
    if softcap:
        raise ValueError("The cuDNN kernel of attention has no soft cap; use the kernel 'xla'.")
    lengths_B = None
    if mask_BS is not None and not causal:
        k_BSKH, v_BSKH = seen_first(mask_BS, k_BSKH, v_BSKH)
    if mask_BS is not None:  # of a causal text the padding comes last anyway
        lengths_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q_BINH,
        k_BSKH.astype(q_BINH.dtype),
        v_BSKH.astype(q_BINH.dtype),
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )


def seen_first(mask_BS: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays (B, S, ...) with the keys that are seen before those that are not."""
    order_BS = jnp.argsort(~mask_BS, axis=1, stable=True)
    return tuple(
        jnp.take_along_axis(x, order_BS.reshape(*order_BS.shape, *(1,) * (x.ndim - 2)), axis=1)
        for x in arrays
    )
