"""Training of a small CLIP on the captioned pictures of the data, for runs without published ones.

Radford et al., arXiv 2103.00020. A text and a picture encoder give embeddings of length one, u_i
and v_i of the i-th of B samples; with a learned scale s, the loss is the mean over both directions
of the cross-entropy of finding the partner among all B:

    -1/2B sum_i [ log softmax_j(s u_i v_j)_i + log softmax_j(s u_j v_i)_i ]

Only the text encoder is kept.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2i_jax.data import loader, sources
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.models.clip import CLIPText, CLIPVision

STEPS, BATCH, RATE = 600, 128, 1e-3
_PATCH = 4  # divides the sizes of the built-in worlds' pictures
_FIRST_SCALE, _LARGEST_SCALE = 1 / 0.07, 100.0


def loss(text_BP: jax.Array, image_BP: jax.Array, log_scale: jax.Array) -> jax.Array:
    """The contrastive loss (nats) of embeddings of any length, row by row partners."""
    text_BP, image_BP = (
        x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text_BP, image_BP)
    )
    scale = jnp.minimum(jnp.exp(log_scale), _LARGEST_SCALE)
    scores_BB, own_B = scale * text_BP @ image_BP.T, jnp.arange(len(text_BP))
    both = (
        optax.softmax_cross_entropy_with_integer_labels(scores, own_B)
        for scores in (scores_BB, scores_BB.T)
    )
    return sum(jnp.mean(x) for x in both) / 2


def batches(
    source: sources.Source, tokenizer: Tokenizer, length: int, batch_size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """{'ids': int32 (B, T), 'image': (B, H, W, 3) in [-1, 1]}, endlessly."""
    shuffle = loader.order.shuffled(len(source), seed)
    position = 0
    while True:
        rows = [source[shuffle[position + i]] for i in range(batch_size)]
        position += batch_size
        ids, _ = tokenizer.encode([row["captions"][0] for row in rows], length)
        yield {"ids": ids, "image": np.stack([row["image"] for row in rows]) / 127.5 - 1}


def train_clip(
    clip: Mapping[str, Any],
    source: sources.Source,
    tokenizer: Tokenizer,
    image_size: int,
    seed: int,
) -> Iterator[tuple[Any, float]]:
    """Yields (parameters of the text encoder, loss) after each of STEPS steps.

    `clip` is the config's section. The picture encoder has the text encoder's sizes.
    """
    text = CLIPText(**clip)
    shared = {name: clip[name] for name in ("width", "num_layers", "num_heads", "mlp_width")}
    shared |= {"projection_width": clip["projection_width"] or clip["width"]}
    image = CLIPVision(image_size=image_size, patch_size=_PATCH, **shared)
    made = batches(source, tokenizer, clip["max_tokens"], BATCH, seed)
    first = next(made)
    keys = jax.random.split(jax.random.key(seed))
    params = {
        "text": meta.unbox(text.init(keys[0], first["ids"])["params"]),
        "image": meta.unbox(image.init(keys[1], first["image"])["params"]),
        "log_scale": jnp.log(_FIRST_SCALE),
    }
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def of_batch(params, batch):
        return loss(
            text.apply({"params": params["text"]}, batch["ids"]),
            image.apply({"params": params["image"]}, batch["image"]),
            params["log_scale"],
        )

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(of_batch)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    for _, batch in zip(range(STEPS), made, strict=False):
        params, opt_state, value = step(params, opt_state, batch)
        yield params["text"], float(value)
