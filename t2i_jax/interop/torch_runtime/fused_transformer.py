"""A language model and a diffusion transformer, deeply fused, in PyTorch (arXiv 2505.10046).

`encode_text` reads a prompt once: its memory is the keys and values that the image tokens of every
layer attend to. `forward` denoises with it, at every step of sampling.
"""

from dataclasses import dataclass

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
import torch
from torch import nn
import torch.nn.functional as F

from .fused_layers import (
    QKV,
    GatedMLP,
    Linear32,
    RMSNorm,
    absolute_table,
    attend,
    image_angles,
    rotate,
    split_heads,
    text_angles,
    time_features,
)

_SMALLEST_TIME = 0.05


@dataclass
class Memory:
    """What the image sees of the prompts: a list of keys and values (B, T, K, H), one a layer.

    A layer without them is None. `start` (B,) is the position of the first image token.
    """

    layers: list
    mask: torch.Tensor
    start: torch.Tensor
    pooled: torch.Tensor | None = None

    def repeat(self, times):
        """The memory of one prompt for a batch of `times`."""
        return self._each(lambda x: x.repeat_interleave(times, dim=0))

    def join(self, other):
        """Both, one after the other along the batch."""
        pairs = [
            None if one is None else tuple(torch.cat(pair) for pair in zip(one, two, strict=True))
            for one, two in zip(self.layers, other.layers, strict=True)
        ]
        pooled = None if self.pooled is None else torch.cat([self.pooled, other.pooled])
        mask, start = torch.cat([self.mask, other.mask]), torch.cat([self.start, other.start])
        return Memory(pairs, mask, start, pooled)

    def _each(self, f):
        pairs = [None if pair is None else tuple(map(f, pair)) for pair in self.layers]
        pooled = None if self.pooled is None else f(self.pooled)
        return Memory(pairs, f(self.mask), f(self.start), pooled)


# --- the language model ---


class LLMBlock(nn.Module):
    def __init__(self, c, plain):
        super().__init__()
        self.c = c
        width, eps, offset = c["width"], c["norm_eps"], c["norm_offset"]
        self.attention_norm = RMSNorm(width, eps, offset)
        self.attention = QKV(width, c["num_heads"], c["num_kv_heads"], c["head_width"])
        self.attention_out = nn.Linear(c["num_heads"] * c["head_width"], width, bias=False)
        self.mlp_norm = RMSNorm(width, eps, offset)
        self.mlp = GatedMLP(width, c["mlp_width"], c["activation"])
        if c["post_norms"]:
            self.attention_post_norm = RMSNorm(width, eps, offset)
            self.mlp_post_norm = RMSNorm(width, eps, offset)
        if c["qk_norm"]:
            self.q_norm = RMSNorm(c["head_width"], eps, offset)
            self.k_norm = RMSNorm(c["head_width"], eps, offset)
        # A layer that a DiT shares attends without the LLM's own scale and soft cap.
        scalar = 0 if plain else c["query_scalar"]
        self.scale = (scalar or c["head_width"]) ** -0.5
        self.softcap = 0.0 if plain else c["softcap"]

    def forward(self, x, mask, angles):
        dtype, post = x.dtype, self.c["post_norms"]
        q, k, v = self.attention(self.attention_norm(x).to(dtype))
        if self.c["qk_norm"]:
            q, k = self.q_norm(q).to(dtype), self.k_norm(k).to(dtype)
        turned = rotate(q, angles), rotate(k, angles), v
        h = self.attention_out(attend(*turned, mask, scale=self.scale, softcap=self.softcap))
        x = x + (self.attention_post_norm(h).to(dtype) if post else h)
        h = self.mlp(self.mlp_norm(x).to(dtype))
        return x + (self.mlp_post_norm(h).to(dtype) if post else h), (k, v)


class LLM(nn.Module):
    """(B, T) ids, right-padded, and mask -> keys and values of every layer, final hidden state."""

    def __init__(self, c, num_plain):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c["vocab_size"], c["width"])
        own = c["num_layers"] - num_plain
        self.blocks = nn.ModuleList(LLMBlock(c, i >= own) for i in range(c["num_layers"]))
        self.final_norm = RMSNorm(c["width"], c["norm_eps"], c["norm_offset"])

    def forward(self, ids, mask):
        length, device = ids.shape[1], ids.device
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        x = self.embed(ids)
        if self.c["scale_embedding"]:
            x = x * torch.tensor(self.c["width"] ** 0.5, dtype=x.dtype, device=device)
        angles = text_angles(length, self.c["head_width"], self.c["rope_theta"], device)
        read = []
        for block in self.blocks:
            x, pair = block(x, causal & mask[:, None, :], angles)
            read.append(pair)
        return read, self.final_norm(x).to(x.dtype)


# --- the sources of the memory ---


class Shallow(nn.Module):
    """Learned keys and values, layer by layer, of the final hidden state."""

    def __init__(self, llm, dit):
        super().__init__()
        self.head_width = llm["head_width"]
        self.norm = RMSNorm(llm["width"], llm["norm_eps"])
        self.context = nn.Linear(llm["width"], dit["width"])
        size = llm["num_kv_heads"] * llm["head_width"]
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(dit["width"], size, bias=False) for name in "kv"})
            for _ in range(dit["num_layers"])
        )

    def forward(self, read, hidden):
        h = self.context(self.norm(hidden).to(hidden.dtype))
        return [
            tuple(split_heads(layer[name](h), self.head_width) for name in "kv")
            for layer in self.layers
        ]


class Mixture(nn.Module):
    """Learned mixtures of the language model's own."""

    def __init__(self, llm, dit):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dit["num_layers"], llm["num_layers"]))

    def forward(self, read, hidden):
        def mixed(i):
            stack = torch.stack([pair[i] for pair in read]).float()
            return torch.einsum("lm,m...->l...", self.weight.float(), stack).to(hidden.dtype)

        return list(zip(mixed(0), mixed(1), strict=True))


class Selected(nn.Module):
    """The language model's own, of the layers that a DiT shares; None for its other layers."""

    def __init__(self, llm, dit, memory):
        super().__init__()
        deep = memory["source"] == "deep"
        self.first = llm["num_layers"] - dit["num_layers"] if deep else memory["first_layer"]
        self.before = 0 if deep else self.first
        self.after = dit["num_layers"] - self.before - (llm["num_layers"] - self.first)

    def forward(self, read, hidden):
        return [None] * self.before + read[self.first :] + [None] * self.after


# --- the diffusion transformer ---


class Embedding(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.hidden, self.out = Linear32(size, width), Linear32(width, width)

    def forward(self, x):
        return self.out(F.silu(self.hidden(x)))


class TimeEmbedding(nn.Module):
    """Timesteps (B,), and a pooled text embedding where the model has one -> (B, D), float32."""

    def __init__(self, width, pooled_width, eps):
        super().__init__()
        self.time = Embedding(256, width)
        if pooled_width:
            self.pooled_norm = RMSNorm(pooled_width, eps)
            self.pooled = Embedding(pooled_width, width)
        self.pooled_width = pooled_width

    def forward(self, timestep, pooled):
        e = self.time(time_features(timestep))
        return e + self.pooled(self.pooled_norm(pooled)) if self.pooled_width else e


class Modulation(nn.Module):
    """Vectors (B, count, D) of the time: W silu(e) + b, or what is given plus a table."""

    def __init__(self, width, count, *, table):
        super().__init__()
        self.count = count
        if table:
            self.table = nn.Parameter(torch.zeros(count * width))
        else:
            self.linear = Linear32(width, count * width)

    def forward(self, x):
        if hasattr(self, "table"):
            return x + self.table.float().unflatten(0, (self.count, -1))
        return self.linear(F.silu(x)).unflatten(-1, (self.count, -1))


class DiTBlock(nn.Module):
    def __init__(self, llm, dit, *, normalise_text):
        super().__init__()
        self.dit, self.normalise_text = dit, normalise_text
        width, eps, head = dit["width"], llm["norm_eps"], llm["head_width"]
        self.cross, self.head_width = dit["attention"] == "cross", head
        inner = llm["num_heads"] * head
        self.attention_norm, self.mlp_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attention = QKV(width, llm["num_heads"], llm["num_kv_heads"], head)
        self.attention_out = nn.Linear(inner, width, bias=False)
        self.mlp = GatedMLP(width, dit["mlp_width"])
        names = []
        if self.cross:
            self.cross_q = nn.Linear(width, inner, bias=False)
            self.cross_out = nn.Linear(inner, width, bias=False)
        if dit["qk_norm"]:
            names += ["q_norm", "k_norm"] + ["cross_q_norm"] * self.cross
            names += ["cross_k_norm"] * (self.cross and normalise_text)
        for name in names:
            setattr(self, name, RMSNorm(head, eps))
        if dit["sandwich_norm"]:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(width, eps), RMSNorm(width, eps)
            if self.cross:
                self.cross_post_norm = RMSNorm(width, eps)
        if dit["conditioning"] in ("adaln-zero", "adaln-single"):
            table = dit["conditioning"] == "adaln-single"
            self.modulation = Modulation(width, 6, table=table)
        own = llm["softcap_shared"] and not normalise_text
        self.text = {
            "scale": ((llm["query_scalar"] if own else 0) or head) ** -0.5,
            "softcap": llm["softcap"] if own else 0.0,
        }

    def forward(self, x, pair, condition, mask, angles):
        first = second = (None, None, None)
        if hasattr(self, "modulation"):
            parts = self.modulation(condition).unsqueeze(2).unbind(1)
            first, second = parts[:3], parts[3:]
        h = self.enter("attention_norm", x, first)
        h = self.attend(h, None if self.cross else pair, mask, angles)
        x = self.leave("attention_post_norm", x, h, first)
        if self.cross:
            h = torch.zeros_like(x) if pair is None else self.attend_to_text(x, pair, mask)
            x = self.leave("cross_post_norm", x, h, (None, None, None))
        h = self.mlp(self.enter("mlp_norm", x, second))
        return self.leave("mlp_post_norm", x, h, second)

    def enter(self, name, x, affine):
        h, (shift, scale, _) = getattr(self, name)(x), affine
        return (h if shift is None else h * (1 + scale) + shift).to(x.dtype)

    def leave(self, name, x, h, affine):
        if self.dit["sandwich_norm"]:
            h = getattr(self, name)(h)
        h = h.float() if affine[2] is None else affine[2] * h.float()
        return (x.float() + h).to(x.dtype)

    def normed(self, name, x):
        return getattr(self, name)(x).to(x.dtype) if self.dit["qk_norm"] else x

    def attend(self, h, pair, mask, angles):
        q, k, v = self.attention(h)
        q, k = (rotate(self.normed(f"{n}_norm", x), angles) for n, x in (("q", q), ("k", k)))
        if pair is None:
            a = attend(
                q, k, v, scale=self.text["scale"] if not self.cross else self.head_width**-0.5
            )
            return self.attention_out(a)
        text_k = self.normed("k_norm", pair[0]) if self.normalise_text else pair[0]
        k, v = torch.cat([text_k, k], 1), torch.cat([pair[1], v], 1)
        seen = torch.cat([mask, mask.new_ones(h.shape[:2])], 1)
        return self.attention_out(attend(q, k, v, seen, **self.text))

    def attend_to_text(self, x, pair, mask):
        q = self.normed("cross_q_norm", split_heads(self.cross_q(x), self.head_width))
        k = self.normed("cross_k_norm", pair[0]) if self.normalise_text else pair[0]
        return self.cross_out(attend(q, k, pair[1], mask, **self.text))


class DiT(nn.Module):
    def __init__(self, llm, dit, channels, *, normalise_text):
        super().__init__()
        self.c, self.llm, self.channels = dit, llm, channels
        width, eps, patch, how = (
            dit["width"],
            llm["norm_eps"],
            dit["patch_size"],
            dit["conditioning"],
        )
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        if how != "none":
            self.time_embed = TimeEmbedding(width, dit["pooled_width"], eps)
        if how == "adaln-single":
            self.shared_modulation = Modulation(width, 6, table=False)
        if how in ("adaln-zero", "adaln-single"):
            self.final_modulation = Modulation(width, 2, table=how == "adaln-single")
        self.blocks = nn.ModuleList(
            DiTBlock(llm, dit, normalise_text=normalise_text) for _ in range(dit["num_layers"])
        )
        self.final_norm = RMSNorm(width, eps)
        self.out = nn.Linear(width, patch * patch * channels)

    def forward(self, z, t, memory):
        c, how, patch = self.c, self.c["conditioning"], self.c["patch_size"]
        dtype = self.patch_embed.weight.dtype
        grid = (z.shape[2] // patch, z.shape[3] // patch)
        x = self.patch_embed(z.to(dtype)).flatten(2).transpose(1, 2)
        if c["table_size"]:
            sizes = (c["width"], c["table_size"], c["table_range"])
            x = x + absolute_table(grid, *sizes, z.device)
        e = None if how == "none" else self.time_embed(1000.0 * t, memory.pooled)
        condition = self.shared_modulation(e) if how == "adaln-single" else e
        if how == "addition":
            x = x + e[:, None]
        x = x.to(dtype)
        head, theta = self.llm["head_width"], self.llm["rope_theta"]
        angles = image_angles(c["positions"], grid, memory.start, head, theta)
        for block, pair in zip(self.blocks, memory.layers, strict=True):
            x = block(x, pair, condition, memory.mask, angles)
        x = self.final_norm(x)
        if how == "adaln-zero":
            scale, shift = self.final_modulation(e).unsqueeze(2).unbind(1)
            x = x * (1 + scale) + shift
        elif how == "adaln-single":
            shift, scale = self.final_modulation(torch.stack([e, e], 1)).unsqueeze(2).unbind(1)
            x = x * (1 + scale) + shift
        x = self.out(x.to(dtype)).float().unflatten(-1, (patch, patch, self.channels))
        x = x.unflatten(1, grid).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        if c["prediction"] == "velocity":
            return x
        return (z.float() - x) / t.clamp(min=_SMALLEST_TIME)[:, None, None, None]


class FusedTransformer(ModelMixin, ConfigMixin):
    """LLM, source of the memory and DiT; the arguments are sections of t2i_jax's config."""

    _no_split_modules = ["LLMBlock", "DiTBlock"]

    @register_to_config
    def __init__(self, llm_config: dict, memory_config: dict, dit_config: dict, channels: int):
        super().__init__()
        llm, memory, dit = llm_config, memory_config, dit_config
        source, shared = memory["source"], 0
        if source in ("deep", "mixture"):
            shared = dit["num_layers"]
        elif source == "middle":
            shared = llm["num_layers"] - memory["first_layer"]
        self.llm = LLM(llm, 0 if llm["softcap_shared"] else shared)
        if source == "shallow":
            self.memory = Shallow(llm, dit)
        elif source == "mixture":
            self.memory = Mixture(llm, dit)
        else:
            self.memory = Selected(llm, dit, memory)
        self.dit = DiT(llm, dit, channels, normalise_text=source == "shallow")
        # Text keys carry positions where they stand in one softmax with the image's.
        self.turned = dit["attention"] == "joint" and source != "shallow"

    @apply_forward_hook  # which brings the weights to where they are computed, if they are away
    def encode_text(self, ids, mask, pooled=None):
        """(B, T) right-padded ids and boolean mask, and CLIP's embedding or None -> Memory."""
        read, hidden = self.llm(ids, mask)
        pairs, start = self.memory(read, hidden), mask.sum(-1)
        if not self.turned:
            return Memory(pairs, mask, torch.zeros_like(start), pooled)
        c = self.llm.c
        angles = text_angles(ids.shape[1], c["head_width"], c["rope_theta"], ids.device)
        pairs = [None if p is None else (rotate(p[0], angles), p[1]) for p in pairs]
        return Memory(pairs, mask, start, pooled)

    def forward(self, z, t, memory):
        """Velocity (B, C, H, W) of latents z at times t (B,) in [0, 1], 1 = noise; float32."""
        return self.dit(z, t, memory)
