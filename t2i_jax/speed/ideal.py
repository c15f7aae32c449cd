"""What must travel between devices, whatever a compiler makes of a program.

To one device of F shards and D replicas of them, for a sharded parameter of b bytes in the dtype
that it is used in: in a training step,

    trained   (F - 1) / F x b       gathered for the forward pass, again for the backward pass,
              (F - 1) / F x b       its gradient scattered, and summed over replicas:
              2 (D - 1) / D x b / F
    frozen    (F - 1) / F x b       gathered once; of an embedding, the rows of the batch, of one
                                    in int8 as bfloat16; the base of low-rank factors again where
                                    the backward pass runs

and for a trained vector, which is whole everywhere, 2 (D F - 1) / (D F) of its float32 gradient. To
draw, the DiT is gathered at every evaluation, and what is frozen once for the prompts and once for
the null prompt. Bytes are by kind of collective.
"""

from collections import Counter
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import sharding


def train_step(config: ConfigDict, arguments: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    """Bytes that a device must receive in a training step with these abstract arguments."""
    shards, replicas = mesh.shape["fsdp"], mesh.shape["data"]
    width = jnp.dtype(config.train.dtype).itemsize
    part = (shards - 1) / shards
    fixed = dict(arguments["frozen"])
    base = fixed.pop("base", {})
    out = _reading(fixed, arguments["batch"], mesh)
    for path, x in jax.tree.leaves_with_path(base):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Behind the first factors. Time and text have no gradient.
        again = name.startswith(("dit/blocks/", "dit/out/")) and "/modulation/" not in name
        out["all-gather"] += (1 + again) * _gathered(x, mesh)
    for x in jax.tree.leaves(arguments["state"].params):
        held = math.prod(x.sharding.shard_shape(x.shape))
        if _sharded(x):
            out["all-gather"] += 2 * part * held * shards * width
            out["reduce-scatter"] += part * held * shards * width
            out["all-reduce"] += 2 * (replicas - 1) / replicas * held * width
        else:
            count = shards * replicas
            out["all-reduce"] += 2 * (count - 1) / count * x.size * x.dtype.itemsize
    return dict(out)


def sample(
    arguments: dict[str, Any], evaluations: int, mesh: Mesh, *, guided: bool = True
) -> dict[str, float]:
    """Bytes that a device must receive to draw, with these abstract arguments of sampler.draw."""
    weights = arguments["weights"]
    out = _reading(weights["frozen"], arguments["text"], mesh)
    if guided:
        out.update(_reading(weights["frozen"], arguments["null"], mesh))
    for name, part in weights["params"].items():
        out["all-gather"] += _gathered(part, mesh) * (evaluations if name == "dit" else 1 + guided)
    return dict(out)


def _gathered(tree: Any, mesh: Mesh) -> float:
    """Bytes that a device receives where every sharded array of a tree is gathered once."""
    leaves = [x for x in jax.tree.leaves(tree) if _sharded(x)]
    return (mesh.shape["fsdp"] - 1) * sharding.bytes_per_device(leaves)


def _reading(frozen: dict[str, Any], words: dict[str, Any], mesh: Mesh) -> Counter[str]:
    """Bytes that a device receives where what is frozen reads `words` once."""
    out: Counter[str] = Counter()
    for path, x in jax.tree.leaves_with_path(frozen):
        if not _sharded(x):
            continue
        if "embed" in jax.tree_util.keystr(path):
            out.update(_rows(x, words["clip_ids" if "clip" in str(path[0]) else "ids"], mesh))
        else:
            out["all-gather"] += _gathered(x, mesh)
    return out


def _rows(table: Any, ids: Any, mesh: Mesh) -> dict[str, float]:
    """Rows of an embedding (sharding.take_rows)."""
    shards = mesh.shape["fsdp"]
    part, width = (shards - 1) / shards, table.shape[-1] * max(table.dtype.itemsize, 2)
    if not _sharded(ids):  # every device gets all rows
        return {"all-reduce": 2 * part * ids.size * width}
    rows = math.prod(ids.sharding.shard_shape(ids.shape)) * shards
    return {"reduce-scatter": part * rows * width, "all-gather": part * rows * ids.dtype.itemsize}


def _sharded(x: Any) -> bool:
    return any("fsdp" in (e if isinstance(e, tuple) else (e,)) for e in x.sharding.spec)
