"""The framework's training step beside the same mathematics by hand (plain.py), in turns.

Both take the same arrays and give the same numbers; at every size the losses are compared before
anything is timed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from t2i_jax import build, flops, sharding
from t2i_jax import config as configs
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.speed import plain, rates, synthetic, timing
from t2i_jax.training import program

# Batch, pixels a side, width, layers. Heads are 64 wide, patches 4 x 4 pixels.
SIZES = {
    "small": (32, 16, 128, 4),
    "medium": (32, 24, 256, 3),
    "large": (8, 32, 512, 2),
}
_TOLERANCE = 1e-4  # of the loss after the compared steps, relative
_COMPARED = 3  # steps
_SECONDS = 20.0  # that a size is measured at least: the shorter its step, the more rounds


def config_of(size: str) -> ConfigDict:
    """The model of one of SIZES: deep source, joint attention, AdaLN-Zero, 2D-RoPE, pixels."""
    batch, side, width, layers = SIZES[size]
    c = configs.base().unlock()
    c.name = size
    c.llm.update(vocab_size=512, width=width, num_layers=layers, num_heads=width // 64)
    c.llm.update(num_kv_heads=width // 128, head_width=64, mlp_width=2 * width, unroll=layers)
    c.dit.update(width=width, num_layers=layers, mlp_width=3 * width, patch_size=4, unroll=layers)
    c.dit.remat = "none"  # by hand, too, everything is kept
    c.autoencoder.update(kind="identity", channels=3, downsample=1, scale=1.0, shift=0.0)
    c.data.update(image_size=side, max_text_tokens=16)
    c.ema.update(decay=0.99, every=1)
    c.train.update(batch_size=batch, dtype="float32", frozen_dtype="float32")
    c.mesh.update(data=1, fsdp=1)
    return c.lock()


class Pair:
    """Both steps, compiled, with states of their own made of the same weights."""

    def __init__(self, config: ConfigDict):
        plain.check(config)
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        frozen = build.abstract_frozen(config, mesh)
        batch = program.abstract_batch(config, mesh)
        self._key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
        self.batch = synthetic.like(batch, config.llm.vocab_size)
        self.frozen = synthetic.like(frozen)
        with jax.set_mesh(mesh):
            programs = program.make(config, mesh, build.make_autoencoder(config))
            params = synthetic.like(programs.state.params)
            same = jax.tree.map(jnp.copy, params)  # both donate theirs
            self.states = {"framework": programs.create(params), "by hand": plain.create(same)}
            steps = {
                "framework": programs.train_step,
                "by hand": jax.jit(plain.make_train_step(config), donate_argnums=0),
            }
            self.compiled = {
                way: step.lower(self.states[way], self.frozen, self.batch, self._key).compile()
                for way, step in steps.items()
            }

    def run(self, way: str) -> dict[str, Any]:
        """One step of 'framework' or 'by hand': its metrics."""
        self.states[way], metrics = self.compiled[way](
            self.states[way], self.frozen, self.batch, self._key
        )
        return metrics


def measure(rounds: int = 15, sizes: tuple[str, ...] = tuple(SIZES)) -> dict[str, Any]:
    """By size: seconds of both and 'ratio', the framework's over those by hand, with its interval.

    Of short steps there are more than `rounds`, to last `_SECONDS`. Raises ConfigError for an
    unknown size, UserError where the two do not compute the same.
    """
    if unknown := set(sizes) - SIZES.keys():
        raise ConfigError(f"--sizes={','.join(unknown)}: known are {', '.join(SIZES)}.")
    found: dict[str, Any] = {"what": "step"}
    for size in sizes:
        config = config_of(size)
        pair = Pair(config)
        for _ in range(_COMPARED):
            ours, theirs = (float(pair.run(way)["loss"]) for way in pair.compiled)
        if not abs(ours - theirs) <= _TOLERANCE * abs(theirs):
            raise UserError(f"{size}: the loss is {ours}, by hand {theirs}.")
        ways = {way: functools.partial(pair.run, way) for way in pair.compiled}
        tried = timing.in_turns(ways, 3)
        once = sum(took.median for took in tried.values())
        times = timing.in_turns(ways, timing.rounds_for(_SECONDS, once, rounds), warmup=0)
        work = sum(flops.train_step(config).values())
        found[size] = {
            "parameters": build.count(pair.states["framework"].params),
            "ratio": round(timing.ratio(times["framework"], times["by hand"]), 4),
            "ratio_interval": [
                round(x, 4) for x in timing.ratio_interval(times["framework"], times["by hand"])
            ],
            **{way: rates.of(took, SIZES[size][0], work, 1) for way, took in times.items()},
        }
    return found


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` in lines."""
    lines = ["The training step in float32 on one device; ratio: framework over by hand"]
    for size in (name for name in found if name != "what"):
        entry = found[size]
        batch, side, width, layers = SIZES[size]
        lines.append(
            f"  {size}: {layers} layers of {width}, {entry['parameters']:,} parameters, batch "
            f"{batch} of {side} x {side}: ratio {entry['ratio']:.3f} (95%: "
            f"{entry['ratio_interval'][0]:.3f} to {entry['ratio_interval'][1]:.3f})"
        )
        lines += [f"    {rates.line(way, entry[way])}" for way in ("framework", "by hand")]
    return "\n".join(lines)


def require(found: dict[str, Any], most: float) -> None:
    """Raises UserError where the framework takes more than `most` times the time of any size."""
    slow = {size: found[size]["ratio"] for size in SIZES if size in found}
    slow = {size: ratio for size, ratio in slow.items() if ratio > most}
    if slow:
        raise UserError(f"The framework's step is slower than --require={most} allows: {slow}.")
