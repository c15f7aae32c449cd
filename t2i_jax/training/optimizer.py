"""The optimiser of a config: gradient clipping, AdamW or Muon, learning-rate schedule.

Muon (Jordan, 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, so that
every direction of the update is of the same size. It applies to the matrices inside the blocks:
weights with the model width on one side and heads or feed-forward width on the other, whatever the
number of axes these are stored in. Embeddings, modulation, in- and output layers take AdamW, with
Nesterov's momentum as Muon's own (optax.contrib.muon has one switch for both).
"""

from typing import Any

import jax
from ml_collections import ConfigDict
import optax
from optax.contrib import MuonDimensionNumbers, muon

from t2i_jax.sharding import Named

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")

_SIDES = {"heads", "kv_heads", "mlp"}  # what faces 'embed' in a matrix of a block


def schedule(peak: float, config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up from peak / warmup, a plateau, and over the last `decay_steps` a decay to 0.

    decay_steps = 0 decays over everything after the warm-up; schedule 'constant' never decays.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule = {config.schedule!r}; known: {SCHEDULES}.")
    warmup = config.warmup_steps
    parts, boundaries = [], []
    if warmup:
        parts.append(optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1))
        boundaries.append(warmup)
    if config.schedule == "constant":
        parts.append(optax.constant_schedule(peak))
    else:
        length = max(steps - warmup, 1)
        decay = min(config.decay_steps or length, length)
        if decay < length:
            parts.append(optax.constant_schedule(peak))
            boundaries.append(steps - decay)
        if config.schedule == "linear":
            parts.append(optax.linear_schedule(peak, 0.0, decay))
        else:
            parts.append(optax.cosine_decay_schedule(peak, decay))
    return optax.join_schedules(parts, boundaries)


def matrix_dimensions(boxed: Any) -> Any:
    """For every parameter its MuonDimensionNumbers, or None where AdamW is to be used."""

    def one(leaf: Named):
        names = leaf.names
        facing = tuple(
            i
            for i, name in enumerate(names)
            if name in _SIDES or (name == "head" and _SIDES & {*names})
        )
        if "embed" not in names or not facing:
            return None
        embed = (names.index("embed"),)
        into = embed[0] < facing[0]  # (D, N, H) maps from the width, (N, H, D) to it
        return MuonDimensionNumbers(*((embed, facing) if into else (facing, embed)))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, Named))


def make(
    config: ConfigDict, steps: int, boxed: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of the section `config.optimizer`, and AdamW's learning rate by step.

    `boxed` are the parameters with their logical axes.

    Raises ValueError for an unknown optimiser or schedule.
    """
    rate = schedule(config.learning_rate, config, steps)
    if config.name == "adamw":
        update = optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )
    elif config.name == "muon":
        dimensions = matrix_dimensions(boxed)
        update = muon(
            schedule(config.muon_learning_rate, config, steps),
            ns_steps=config.muon_steps,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=dimensions,
        )
    else:
        raise ValueError(f"optimizer.name = {config.name!r}; known: {OPTIMIZERS}.")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update), rate
