"""The train step written by hand: jax.numpy, jax.random and jax.grad, dictionaries of arrays.

The mathematics of training/step.py for one kind of model (deep source, joint attention, AdaLN-Zero,
2D-RoPE, a Gemma) in float32 on one device, and nothing of the framework: no modules, no sharding,
no names, no optax. It is what the framework's step is measured against (speed/step.py), and a
second way to its numbers. The loop over layers is Python's; between steps the arrays of all layers
are stacked, because an optimiser on a few large arrays is faster than on many small ones.

    state = {'step', 'params', 'ema', 'mu', 'nu'}

Shape letters as in models/layers.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from t2i_jax.errors import ConfigError

_NEEDED = {
    "memory.source": "deep",
    "dit.attention": "joint",
    "dit.positions": "2d-rope",
    "dit.conditioning": "adaln-zero",
    "dit.prediction": "velocity",
    "dit.qk_norm": True,
    "dit.sandwich_norm": False,
    "dit.table_size": 0,
    "dit.pooled_width": 0,
    "llm.norm_offset": 1.0,
    "llm.activation": "gelu",
    "llm.scale_embedding": True,
    "llm.post_norms": False,
    "llm.qk_norm": False,
    "llm.query_scalar": 0.0,
    "llm.softcap": 0.0,
    "autoencoder.kind": "identity",
    "optimizer.name": "adamw",
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "ema.every": 1,
    "ema.warmup": False,
    "train.accumulation": 1,
    "train.dtype": "float32",
    "train.frozen_dtype": "float32",
    "train.llm_quantization": "none",
    "train.block_norms": False,
}


def check(config: ConfigDict) -> None:
    """Raises ConfigError, naming the key, where the step of `config` is another one."""
    for key, needed in _NEEDED.items():
        section, name = key.split(".")
        if config[section][name] != needed:
            given = config[section][name]
            raise ConfigError(f"{key} = {given!r}: the step by hand is one of {needed!r}.")


def rms(x, eps, weight=0.0):
    """x / rms(x) (1 + weight), over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * (1.0 + weight)


def turn(x_BSNH, angles_BSH):
    """Pairs (i, i + H/2) of every head turned by the angles."""
    cos, sin = jnp.cos(angles_BSH)[:, :, None], jnp.sin(angles_BSH)[:, :, None]
    a, b = jnp.split(x_BSNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BINH, k_BSKH, v_BSKH, seen):
    """Softmax attention, N / K heads of queries to one of keys; `seen` is (B, 1, 1, I or 1, S)."""
    batch, length, heads, width = q_BINH.shape
    groups = k_BSKH.shape[2]
    q = q_BINH.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bikgh,bskh->bkgis", q, k_BSKH) * width**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bkgis,bskh->bikgh", weights, v_BSKH).reshape(batch, length, -1)


def flat(weight, contracted=1):
    """A weight as a matrix, its first axes being inputs."""
    return weight.reshape(int(np.prod(weight.shape[:contracted])), -1)


def heads(x_BSD, weight_DNH):
    """(B, S, D) -> (B, S, N, H)."""
    return (x_BSD @ flat(weight_DNH)).reshape(*x_BSD.shape[:2], *weight_DNH.shape[1:])


def mlp(p, x):
    """The gated MLP of both networks."""
    gate = jax.nn.gelu(x @ p["gate"]["weight"], approximate=True)
    return (gate * (x @ p["up"]["weight"])) @ p["down"]["weight"]


def read(p, ids_BT, mask_BT, c) -> list[tuple[jax.Array, jax.Array]]:
    """The language model: turned keys and values of the layers that the DiT shares."""
    first = c.num_layers - c.shared
    length, table = ids_BT.shape[1], p["embed"]["weight"]
    x = table[ids_BT] * table.shape[1] ** 0.5
    angles = (jnp.arange(length)[:, None] * frequencies(c.head_width, c.theta))[None]
    seen = jnp.tril(jnp.ones((length, length), bool)) & mask_BT[:, None]
    seen = seen[:, None, None]
    out = []
    for i, layer in enumerate(p["blocks"]):
        h = rms(x, c.eps, layer["attention_norm"]["weight"])
        q, k, v = (heads(h, layer["attention"][name]["weight"]) for name in "qkv")
        k = turn(k, angles)
        if i >= first:
            out.append((k, v))
        if i + 1 < len(p["blocks"]):  # of the last layer nothing else is wanted
            a = attention(turn(q, angles), k, v, seen)
            x = x + a @ flat(layer["attention_out"]["weight"], 2)
            x = x + mlp(layer["mlp"], rms(x, c.eps, layer["mlp_norm"]["weight"]))
    return out


def frequencies(width, theta):
    """theta^(-2i / width)."""
    return theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def embed_time(p, t_B):
    """1000 t -> e (B, D)."""
    half = 128
    frequency = np.exp(-np.log(10_000.0) * np.arange(half) / half).astype(np.float32)
    angle = 1000.0 * t_B[:, None] * frequency
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = jax.nn.silu(x @ p["hidden"]["weight"] + p["hidden"]["bias"])
    return x @ p["out"]["weight"] + p["out"]["bias"]


def modulation(p, e_BD):
    """e (B, D) -> (B, M, 1, D)."""
    linear = p["linear"]
    x = jax.nn.silu(e_BD) @ flat(linear["weight"]) + linear["bias"].reshape(-1)
    return x.reshape(e_BD.shape[0], -1, 1, e_BD.shape[1])


def denoise(p, z_BHWC, t_B, text, mask_BT, c):
    """The DiT: velocity (B, H, W, C)."""
    batch, height, width, channels = z_BHWC.shape
    size = c.patch
    rows, columns = height // size, width // size
    x = z_BHWC.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    x = x.reshape(batch, rows * columns, -1)
    x = x @ flat(p["patch_embed"]["weight"], 3) + p["patch_embed"]["bias"]
    e = embed_time(p["time_embed"]["time"], t_B)

    start = jnp.sum(mask_BT, axis=1).astype(jnp.float32)[:, None]
    row = start + jnp.repeat(jnp.arange(rows), columns)
    column = start + jnp.tile(jnp.arange(columns), rows)
    half = frequencies(c.head_width // 2, c.theta)
    angles = jnp.concatenate([row[..., None] * half, column[..., None] * half], axis=-1)
    seen = jnp.concatenate([mask_BT, jnp.ones((batch, rows * columns), bool)], axis=1)
    seen = seen[:, None, None, None]

    for layer, (text_k, text_v) in zip(p["blocks"], text, strict=True):
        m = modulation(layer["modulation"], e)
        h = rms(x, c.eps, layer["attention_norm"]["weight"]) * (1.0 + m[:, 1]) + m[:, 0]
        q, k, v = (heads(h, layer["attention"][name]["weight"]) for name in "qkv")
        q = turn(rms(q, c.eps, layer["q_norm"]["weight"]), angles)
        k = turn(rms(k, c.eps, layer["k_norm"]["weight"]), angles)
        keys, values = jnp.concatenate([text_k, k], 1), jnp.concatenate([text_v, v], 1)
        a = attention(q, keys, values, seen)
        x = x + m[:, 2] * (a @ flat(layer["attention_out"]["weight"], 2))
        h = rms(x, c.eps, layer["mlp_norm"]["weight"]) * (1.0 + m[:, 4]) + m[:, 3]
        x = x + m[:, 5] * mlp(layer["mlp"], h)

    m = modulation(p["final_modulation"], e)
    x = rms(x, c.eps, p["final_norm"]["weight"]) * (1.0 + m[:, 0]) + m[:, 1]
    x = x @ flat(p["out"]["weight"]) + p["out"]["bias"].reshape(-1)
    x = x.reshape(batch, rows, columns, size, size, channels).swapaxes(2, 3)
    return x.reshape(z_BHWC.shape)


class Sizes:
    """What is not in the shapes of the arrays."""

    def __init__(self, config: ConfigDict):
        self.num_layers, self.shared = config.llm.num_layers, config.dit.num_layers
        self.head_width, self.theta = config.llm.head_width, config.llm.rope_theta
        self.eps, self.patch = config.llm.norm_eps, config.dit.patch_size


def make_train_step(config: ConfigDict) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """(state, frozen, batch, key) -> (state, metrics), as training/step.py has it; to be jitted.

    Raises ConfigError for a config of another kind of step.
    """
    check(config)
    c, optimizer, flow = Sizes(config), config.optimizer, config.flow
    sigma = np.arange(flow.num_timesteps, 0, -1, dtype=np.float32) / flow.num_timesteps
    levels = jnp.asarray(flow.shift * sigma / (1 + (flow.shift - 1) * sigma))

    def train_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state["step"])
        x = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        x = (x - config.autoencoder.shift) * config.autoencoder.scale
        noise = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
        normal = jax.random.normal(jax.random.fold_in(key, 2), x.shape[:1])
        u = jax.nn.sigmoid(flow.time_mean + flow.time_std * normal)
        index = jnp.minimum((flow.num_timesteps * u).astype(int), flow.num_timesteps - 1)
        t = levels[index]
        t_ = t[:, None, None, None]
        z = (1.0 - t_) * x + t_ * noise
        text = read(split_layers(frozen["llm"]), batch["ids"], batch["mask"], c)

        def loss_of(dit):
            v = denoise(dit, z, t, text, batch["mask"], c)
            return jnp.mean((v - (noise - x)) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(split_layers(state["params"]["dit"]))
        grads = {"dit": stack_layers(grads)}
        state, norms = adamw(state, grads, optimizer, config.ema.decay)
        return state, {"loss": loss, **norms}

    return train_step


def norm(tree):
    """Of all numbers of a tree."""
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def adamw(state, grads, o, decay):
    """One update, its gradient clipped, and the moving average of the parameters."""
    step, size = state["step"] + 1, norm(grads)
    clip = jnp.where(size < o.clip_norm, 1.0, o.clip_norm / size)
    grads = jax.tree.map(lambda g: g * clip, grads)
    mu = jax.tree.map(lambda m, g: o.b1 * m + (1 - o.b1) * g, state["mu"], grads)
    nu = jax.tree.map(lambda n, g: o.b2 * n + (1 - o.b2) * g * g, state["nu"], grads)

    def update(p, m, n):
        m, n = m / (1 - o.b1**step), n / (1 - o.b2**step)
        return -o.learning_rate * (m / (jnp.sqrt(n) + o.eps) + o.weight_decay * p)

    updates = jax.tree.map(update, state["params"], mu, nu)
    params = jax.tree.map(jnp.add, state["params"], updates)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
    new = {"step": step, "params": params, "ema": ema, "mu": mu, "nu": nu}
    rate = jnp.float32(o.learning_rate)
    norms = {"grad_norm": size, "param_norm": norm(params), "update_norm": norm(updates)}
    return new, norms | {"learning_rate": rate}


def create(params: Any) -> dict[str, Any]:
    """The state before the first step."""
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    average = jax.tree.map(jnp.copy, params)
    step = jnp.zeros((), jnp.int32)
    return {"step": step, "params": params, "ema": average, "mu": zeros[0], "nu": zeros[1]}


def split_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of one network, its stacked layers as a list of layers."""
    blocks = params["blocks"]
    count = len(jax.tree.leaves(blocks)[0])
    layers = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count)]
    return params | {"blocks": layers}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `split_layers`."""
    return params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"])}
