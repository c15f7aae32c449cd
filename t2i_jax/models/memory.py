"""The text memory: all that image tokens ever see of the prompt.

Text tokens never attend to image tokens and the language model is frozen, so what the prompt
contributes to layer l of the DiT is the same for every noise level and every sampling step: keys
and values (B, T, K, H) and a padding mask. A *source* makes a memory from what the language model
read; how the DiT attends to it, in one softmax with the image or in an attention of its own, is
the DiT's affair. The paper's families are the four pairs (arXiv 2505.10046, sections 3 and 4):

                    joint attention                       cross attention
    deep source     FuseDiT                               FuseDiT, "cross-attention"
    shallow source  self-attention DiT (MM-DiT's kin)     cross-attention DiT (PixArt's kin)

A further way of conditioning is one more source here.

Shape letters: L layers of the DiT, M of the LLM, B batch, T text tokens, K key/value heads, H head
width, D width of the DiT, E of the LLM, P pooled width.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t2i_jax.models import layers
from t2i_jax.models.positions import rotate, text_angles
from t2i_jax.sharding import with_axes


@flax.struct.dataclass
class TextFeatures:
    """What the frozen language model read.

    Attributes:
      keys_LBTKH: keys of every layer (M, B, T, K, H), before they are turned to their positions.
      values_LBTKH: values of every layer.
      hidden_BTD: the final, normalised hidden state (B, T, E).
      mask_BT: True at real tokens.
    """

    keys_LBTKH: jax.Array
    values_LBTKH: jax.Array
    hidden_BTD: jax.Array
    mask_BT: jax.Array


@flax.struct.dataclass
class TextMemory:
    """Keys and values of the text for every layer of the DiT.

    Attributes:
      keys_LBTKH: (L, B, T, K, H), L layers of the DiT.
      values_LBTKH: likewise.
      seen_L: bool; where False, the layer sees no text.
      mask_BT: True at real tokens.
      start_B: the position of the first image token: the number of real tokens where the keys
        carry positions, so that the image goes on where the text ends; else 0.
      pooled_BP: a pooled embedding of the prompt for the conditioning, or None.
    """

    keys_LBTKH: jax.Array
    values_LBTKH: jax.Array
    seen_L: jax.Array
    mask_BT: jax.Array
    start_B: jax.Array
    pooled_BP: jax.Array | None = None


class Source(nn.Module):
    """TextFeatures -> TextMemory for a DiT of `num_layers` layers and width `width`."""

    num_layers: int
    width: int
    rope_theta: float | None  # keys are turned to their positions with it; None: they are not
    norm_eps: float
    first_layer: int = 0
    dtype: layers.Dtype = jnp.float32

    normalises_keys: ClassVar[bool] = False  # the DiT's key norm is for these keys, too

    def num_shared(self, llm_layers: int) -> int:
        """How many layers of the LLM, the last ones, share their attention with the DiT's."""
        del llm_layers
        return self.num_layers

    def memory_of(self, features, keys_LBTKH, values_LBTKH, seen_L=None) -> TextMemory:
        """The memory of these keys and values, before rotation."""
        start_B = jnp.sum(features.mask_BT, axis=-1)
        if self.rope_theta is None:
            start_B = jnp.zeros_like(start_B)
        else:
            length, _, head_width = keys_LBTKH.shape[2:]
            angles = text_angles(length, head_width, self.rope_theta)
            keys_LBTKH = jax.vmap(rotate, (0, None))(keys_LBTKH, angles)
        if seen_L is None:
            seen_L = jnp.ones(self.num_layers, bool)
        return TextMemory(keys_LBTKH, values_LBTKH, seen_L, features.mask_BT, start_B)


class Deep(Source):
    """Deep fusion: layer i of L sees the LLM's own keys and values of its layer M - L + i."""

    def __call__(self, features: TextFeatures) -> TextMemory:
        """Raises ValueError where the DiT has more layers than the LLM."""
        first = _layers(features) - self.num_layers
        if first < 0:
            raise ValueError(
                f"A DiT of {self.num_layers} layers cannot share the {_layers(features)} layers "
                "of its LLM; set dit.num_layers to at most llm.num_layers."
            )
        return self.memory_of(features, features.keys_LBTKH[first:], features.values_LBTKH[first:])


class Middle(Source):
    """Deep fusion of some layers alone: i sees layer i of the LLM, for `first_layer` <= i < M.

    The layers of the DiT before and after these see the image alone.
    """

    def num_shared(self, llm_layers: int) -> int:
        """All from `first_layer` on."""
        return llm_layers - self.first_layer

    def __call__(self, features: TextFeatures) -> TextMemory:
        """Raises ValueError where there are no such layers of both networks."""
        first, last = self.first_layer, _layers(features)
        if not 0 <= first < last <= self.num_layers:
            raise ValueError(
                f"Layers {first} to {last - 1} cannot be shared by a DiT of {self.num_layers}: "
                "memory.first_layer < llm.num_layers <= dit.num_layers is needed."
            )
        around = [(first, self.num_layers - last)] + [(0, 0)] * 4
        keys_LBTKH = jnp.pad(features.keys_LBTKH[first:], around)
        values_LBTKH = jnp.pad(features.values_LBTKH[first:], around)
        layer_L = jnp.arange(self.num_layers)
        seen_L = (layer_L >= first) & (layer_L < last)
        return self.memory_of(features, keys_LBTKH, values_LBTKH, seen_L)


class Mixture(Source):
    """Deep fusion of learned mixtures: layer i sees sum_m w_im (keys, values of the LLM's m).

    The weights start as those of `Deep`, so that a new model is a deep one.
    """

    @nn.compact
    def __call__(self, features: TextFeatures) -> TextMemory:
        """Raises ValueError where the DiT has more layers than the LLM."""
        first = _layers(features) - self.num_layers
        if first < 0:
            raise ValueError(
                f"A DiT of {self.num_layers} layers has no mixture to start from of the "
                f"{_layers(features)} layers of its LLM; set dit.num_layers to at most that."
            )

        def aligned(key, shape):
            del key
            return jnp.eye(*shape, k=first)

        shape = (self.num_layers, _layers(features))
        weight = self.param("weight", with_axes(aligned, (None, None)), shape)

        def mix(x_MBTKH):
            # In float32: in bfloat16 a weight of 1 would move by steps of a hundredth.
            mixed = jnp.einsum(
                "LM,MBTKH->LBTKH",
                weight.astype(jnp.float32),
                x_MBTKH.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            return mixed.astype(self.dtype)

        return self.memory_of(features, mix(features.keys_LBTKH), mix(features.values_LBTKH))


class Shallow(Source):
    """Learned keys and values, layer by layer, of the LLM's final hidden state (B, T, E).

    A norm and a linear layer bring it to the DiT's width, once for all layers. Keys carry no
    positions whatever `rope_theta` is, and the DiT normalises them as it does its own.
    """

    normalises_keys: ClassVar[bool] = True

    def num_shared(self, llm_layers: int) -> int:
        """None: the language model is used as it is."""
        del llm_layers
        return 0

    @nn.compact
    def __call__(self, features: TextFeatures) -> TextMemory:
        _, _, _, heads, head_width = features.keys_LBTKH.shape
        h_BTE = layers.RMSNorm(self.norm_eps, name="norm")(features.hidden_BTD)
        h_BTD = layers.Einsum(
            "BTE,ED->BTD",
            (h_BTE.shape[-1], self.width),
            (None, "embed"),
            bias=True,
            init=layers.fixed(nn.initializers.normal(0.02)),
            dtype=self.dtype,
            name="context",
        )(h_BTE)
        project = layers.for_each_layer(layers.KeyValue, self.num_layers)
        k_LBTKH, v_LBTKH = project(heads, head_width, dtype=self.dtype, name="layers")(h_BTD)
        start_B = jnp.zeros(h_BTD.shape[0], jnp.int32)
        seen_L = jnp.ones(self.num_layers, bool)
        return TextMemory(k_LBTKH, v_LBTKH, seen_L, features.mask_BT, start_B)


SOURCES: dict[str, type[Source]] = {
    "deep": Deep,
    "shallow": Shallow,
    "middle": Middle,
    "mixture": Mixture,
}


def find_source(name: str) -> type[Source]:
    """The source of this name; raises ValueError naming those there are."""
    if name not in SOURCES:
        raise ValueError(f"Unknown memory source {name!r}; known: {list(SOURCES)}.")
    return SOURCES[name]


def _layers(features: TextFeatures) -> int:
    return features.keys_LBTKH.shape[0]


def _along_batch(join, *memories: TextMemory) -> TextMemory:
    """`join(arrays, axis)` of every field; `seen_L` has no batch and is the first one's."""

    def one(name, *arrays):
        if arrays[0] is None or name == "seen_L":
            return arrays[0]
        return join(arrays, 1 if name.endswith("_LBTKH") else 0)

    names = [field.name for field in dataclasses.fields(TextMemory)]
    return TextMemory(**{name: one(name, *(getattr(m, name) for m in memories)) for name in names})


def interleave(*memories: TextMemory) -> TextMemory:
    """The first rows of memories of one model, then the second ones; their lengths T are equal.

    Not one memory after the other: where the batch is in shards, each would hold rows that belong
    to two others then.
    """

    def rows(arrays, axis):
        stacked = jnp.stack(arrays, axis + 1)
        return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])

    return _along_batch(rows, *memories)


def repeat(memory: TextMemory, times: int) -> TextMemory:
    """The memory of one prompt (B = 1) for a batch of `times`."""
    return _along_batch(lambda arrays, axis: jnp.repeat(arrays[0], times, axis=axis), memory)
