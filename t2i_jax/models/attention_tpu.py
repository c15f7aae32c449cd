"""Attention on TPU: JAX's splash kernel (Pallas), with our heads, padding and meshes around it.

The kernel keeps a block of scores in VMEM and no more, forwards and backwards. Padding is said by
segment ids: queries are of segment 1, keys of 1 where they may be seen and of 0 elsewhere, so no
mask of (queries x keys) exists. Key/value heads are the model's own; nothing is repeated. On other
platforms the kernel is interpreted: slow, for tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t2i_jax import sharding

RESIDUALS = "attention"  # checkpoint name of the kernel's output and normaliser
_LANES = 128  # lengths and head widths are padded to multiples of it
_LEAST = 128 * 256  # scores of a head below which padding would cost more than the kernel gives

# Queries and keys of a block at most, and of one in the backward pass, which holds four arrays of
# scores: by what a kernel may have of VMEM, which is 16 MB in v4 and v5.
_SMALL, _MIDDLE = ((512, 640), (256, 640)), ((512, 1280), (256, 1280))
_LARGE = ((1024, 1280), (512, 1280))
_BLOCKS = {"TPU v4": _SMALL, "TPU v5 lite": _MIDDLE}  # others have the large ones
_FAT = 512  # bytes of a head above which they do not: float32, or the autoencoder's
_COMPUTED = 640  # keys of which scores are computed at once


def suits(q_BINH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether the kernel is worth it."""
    return q_BINH.shape[1] * k_BSKH.shape[1] >= _LEAST and q_BINH.shape[3] >= _LANES // 2


def attend(q_BINH, k_BSKH, v_BSKH, mask_BS, *, scale, causal, softcap) -> jax.Array:
    """As `attention.attend`."""
    if mask_BS is None:
        mask_BS = jnp.ones(k_BSKH.shape[:2], bool)
    one = functools.partial(_on_one_device, scale=scale, causal=causal, softcap=softcap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return one(q_BINH, k_BSKH, v_BSKH, mask_BS)
    k_BSKH, v_BSKH, kv_axis = _spread(k_BSKH, v_BSKH, q_BINH.shape[2], mesh.shape["tensor"])
    batch = sharding.RULES["batch"]
    batch = None if q_BINH.shape[0] % sharding.batch_shards(mesh) else batch
    one_for_all = k_BSKH.shape[2] == 1 and q_BINH.shape[2] % mesh.shape["tensor"] == 0
    heads = "tensor" if kv_axis or one_for_all else None
    q_spec = PartitionSpec(batch, None, heads, None)
    kv_spec = PartitionSpec(batch, None, kv_axis, None)
    specs = (q_spec, kv_spec, kv_spec, PartitionSpec(batch, None))
    mapped = jax.shard_map(one, in_specs=specs, out_specs=q_spec, check_vma=False)
    return mapped(q_BINH, k_BSKH, v_BSKH, mask_BS)


def _spread(k_BSKH, v_BSKH, heads: int, shards: int):
    """Keys and values for query heads in `shards` parts, and their own mesh axis, if they have one.

    One head serves all parts; heads that the parts divide are divided; of fewer heads each part
    gets the one that its queries need. Other numbers are not split at all.
    """
    kv_heads = k_BSKH.shape[2]
    if shards == 1 or kv_heads == 1 or heads % shards:
        return k_BSKH, v_BSKH, None
    if kv_heads % shards == 0:
        return k_BSKH, v_BSKH, "tensor"
    if shards % kv_heads == 0:
        k_BSKH, v_BSKH = (jnp.repeat(x, shards // kv_heads, axis=2) for x in (k_BSKH, v_BSKH))
        return k_BSKH, v_BSKH, "tensor"
    return k_BSKH, v_BSKH, None


def _on_one_device(q_BINH, k_BSKH, v_BSKH, mask_BS, *, scale, causal, softcap) -> jax.Array:
    splash = _splash()
    queries, width = q_BINH.shape[1], q_BINH.shape[3]
    q = _padded((q_BINH.astype(jnp.float32) * scale).astype(q_BINH.dtype))
    k, v = _padded(k_BSKH.astype(q.dtype)), _padded(v_BSKH.astype(q.dtype))
    seen_BS = jnp.pad(mask_BS, ((0, 0), (0, k.shape[2] - mask_BS.shape[1]))).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kv=seen_BS)
    shape = (q.shape[2], k.shape[2])
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    platform, kind = sharding.device()
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=block_sizes(*shape, q.shape[3] * q.dtype.itemsize, kind),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESIDUALS,
        interpret=platform != "tpu",
    )
    out_BNIH = jax.vmap(kernel)(q, k, v, segments)
    return out_BNIH[:, :, :queries, :width].swapaxes(1, 2)


def block_sizes(queries: int, keys: int, head_bytes: int, kind: str) -> Any:
    """Blocks for padded lengths and heads on a device of this kind: the largest that fit."""
    most = _BLOCKS.get(kind, _LARGE if head_bytes <= _FAT else _MIDDLE)
    (q, kv), (q_back, kv_back) = ((_divisor(queries, n), _divisor(keys, m)) for n, m in most)
    return _splash().BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=_divisor(kv, _COMPUTED),
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=_divisor(kv_back, _COMPUTED),
        use_fused_bwd_kernel=True,
    )


def _splash() -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention  # takes two seconds to import

    return splash_attention


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `most`."""
    return max(n for n in range(_LANES, most + 1, _LANES) if length % n == 0)


def _padded(x_BSNH: jax.Array) -> jax.Array:
    """(B, N, S', H'): heads before positions, both lengths padded with zeros for the kernel."""
    _, length, _, width = x_BSNH.shape
    padding = ((0, 0), (0, -length % _LANES), (0, 0), (0, -width % _LANES))
    return jnp.pad(x_BSNH, padding).swapaxes(1, 2)
