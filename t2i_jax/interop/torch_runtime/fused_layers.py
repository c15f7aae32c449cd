"""Layers of a fused text-to-image transformer, in PyTorch.

Modules and parameters are named as those of t2i_jax/models, whose docstrings say what they are.
Shapes: B batch, S tokens (T of text, I of the image), D width, N query heads, K key/value heads, H
head width. Norms and softmax are computed in float32, whatever the dtype of the rest.
"""

import math

import torch
from torch import nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), returned in float32."""

    def __init__(self, width, eps, offset=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * (self.offset + self.weight.float())


class Linear32(nn.Linear):
    """A linear layer that is computed in float32, whatever its weights are stored in."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, width, mlp_width, activation="gelu"):
        super().__init__()
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)
        self.activation = activation

    def forward(self, x):
        gate = self.gate(x)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * self.up(x))


class QKV(nn.Module):
    """Queries (B, S, N, H), keys and values (B, S, K, H)."""

    def __init__(self, width, heads, kv_heads, head_width):
        super().__init__()
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * head_width, bias=False)
        self.head_width = head_width

    def forward(self, x):
        return tuple(split_heads(part(x), self.head_width) for part in (self.q, self.k, self.v))


def split_heads(x, head_width):
    """(B, S, N H) -> (B, S, N, H)."""
    return x.unflatten(-1, (-1, head_width))


def attend(q, k, v, mask=None, *, scale, softcap=0.0):
    """softmax(scale q k^T) v, heads grouped; `mask` (B, S) or (B, I, S), True where seen.

    A `softcap` c makes c tanh(s / c) of a scaled score s.
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if mask is not None:
        mask = (mask[:, None] if mask.dim() == 2 else mask)[:, None]
    if softcap:
        scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * scale / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def frequencies(head_width, theta, device):
    """theta^(-2i / H) for i < H / 2."""
    steps = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    return theta ** -(steps / head_width)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i + H/2}) of heads (..., S, N, H) by angles (..., S, H / 2)."""
    if angles is None:
        return x
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def text_angles(length, head_width, theta, device):
    """Angles (T, H / 2) of the positions 0..T-1."""
    places = torch.arange(length, dtype=torch.float32, device=device)
    return places[:, None] * frequencies(head_width, theta, device)


def image_angles(kind, grid, start, head_width, theta):
    """Angles (B, I, H / 2) of a grid (rows, columns) of image tokens that begins at `start` (B)."""
    if kind == "none":
        return None
    rows, columns = grid
    device = start.device
    row = torch.arange(rows, device=device).repeat_interleave(columns).float()
    column = torch.arange(columns, device=device).repeat(rows).float()
    n = start.float()[:, None]
    if kind == "1d-rope":
        return (n + row * columns + column)[..., None] * frequencies(head_width, theta, device)
    row, column = (n + row)[..., None], (n + column)[..., None]
    if kind == "2d-rope":
        first = second = frequencies(head_width // 2, theta, device)
    else:  # m-rope
        first, second = frequencies(head_width, theta, device).chunk(2)
    return torch.cat([row * first, column * second], -1)


def absolute_table(grid, width, side, extent, device):
    """The middle of a side x side table of sines and cosines of columns and rows: (I, D)."""
    if max(grid) > side:
        raise ValueError(
            f"{grid[0]} x {grid[1]} image tokens do not fit a table of {side} x {side}."
        )
    steps = torch.arange(width // 4, dtype=torch.float32, device=device)
    frequency = 10_000.0 ** -(steps / (width // 4))
    row, column = (
        (torch.arange(n, device=device) + (side - n) // 2).float() * (extent / side) for n in grid
    )
    row, column = row.repeat_interleave(grid[1]), column.repeat(grid[0])
    angles = [place[:, None] * frequency for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], -1)


def time_features(timestep, width=256):
    """[cos, sin] of the timesteps (B,), 0 to 1000, at width / 2 frequencies: (B, width)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    exponent = -math.log(10_000.0) * steps / half
    angle = timestep.float()[:, None] * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], -1)
