"""Pre-training of a small language model on the captions, for runs without published weights.

Next-token prediction: the mean cross-entropy of every real token after the first, given those
before it. A few hundred steps; made again from the start if it is interrupted.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2i_jax.models.fusion import TextToImageModel


def next_token_loss(logits_BTV: jax.Array, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy (nats) of ids[:, 1:] under logits[:, :-1], over real tokens; scalar."""
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], ids_BT[:, 1:])
    weight_BT = mask_BT[:, 1:].astype(jnp.float32)
    return jnp.sum(loss_BT * weight_BT) / jnp.maximum(jnp.sum(weight_BT), 1.0)


def pretrain(
    model: TextToImageModel,
    params: Any,
    batches: Iterator[Any],
    *,
    steps: int,
    learning_rate: float,
) -> Iterator[tuple[Any, jax.Array]]:
    """Yields (parameters of the LLM, loss) after each of `steps` AdamW steps.

    Linear warm-up over the first tenth to `learning_rate`, cosine decay to zero. `batches` are
    {'ids', 'mask'}, already on the devices.
    """
    warmup = max(steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def loss(params, batch):
        logits = model.apply(
            {"params": {"llm": params}},
            batch["ids"],
            batch["mask"],
            method=lambda m, ids, mask: m.llm.logits(ids, mask),
        )
        return next_token_loss(logits, batch["ids"], batch["mask"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    for _, batch in zip(range(steps), batches, strict=False):
        params, opt_state, value = step(params, opt_state, batch)
        yield params, value
