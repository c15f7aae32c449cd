"""Sampling, timed: the program of sampler.py on synthetic numbers, prompts to pixels.

And the same with the text read anew at every step, as a model without a text memory would: what
the memory saves, in time, beside what it saves in FLOPs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from t2i_jax import build, flops, options, sampler, sharding
from t2i_jax.errors import ConfigError
from t2i_jax.models.fusion import TextToImageModel
from t2i_jax.models.memory import TextMemory
from t2i_jax.speed import rates, synthetic, timing


@dataclasses.dataclass(frozen=True)
class Recomputing:
    """A model whose memory of a text is its tokens: they are read at every step.

    The trained parameters that it is given hold those of the language model, too.
    """

    model: TextToImageModel
    lora_scale = 0.0

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        """As the model's, for the three methods that sampling uses."""
        if method == "read_text":
            return args
        if method == "remember":
            (ids_BT, mask_BT), pooled_BP = args
            ids = ids_BT[None]  # in the place of keys: it has the batch where they have it
            start_B = jnp.zeros(len(ids_BT), jnp.int32)
            return TextMemory(ids, ids, jnp.ones(1, bool), mask_BT, start_B, pooled_BP)
        z, t_B, memory = args
        # Tied to z, or the compiler would take what does not change out of the loop.
        ids_BT, z = jax.lax.optimization_barrier((memory.keys_LBTKH[0], z))
        features = self.model.apply(variables, ids_BT, memory.mask_BT, method="read_text")
        memory = self.model.apply(variables, features, memory.pooled_BP, method="remember")
        return self.model.apply(variables, z, t_B, memory, method="denoise")


def measure(
    config: ConfigDict,
    rounds: int = 5,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    recompute: bool = False,
) -> dict[str, Any]:
    """Seconds of a batch of pictures, as a tree for JSON; sizes default to the config's.

    With `recompute` the text is read at every step, too, and 'recomputed' holds the ratio of both.
    Raises ConfigError for steps out of range and a batch that does not divide.
    """
    config = config.copy_and_resolve_references().unlock()
    config.lora.rank = 0  # factors are merged before anything is drawn
    mesh = sharding.make_mesh(**config.mesh)
    size, steps = batch_size or config.sampling.batch_size, steps or config.sampling.steps
    shards = sharding.batch_shards(mesh)
    if size % shards:
        raise ConfigError(f"--batch_size={size} must be a multiple of the {shards} shards.")
    chosen = options.resolve(config, steps=steps)
    with jax.set_mesh(mesh):
        programs = compiled(config, mesh, size, chosen, recompute=recompute)
        ways = {name: functools.partial(run, *given) for name, (run, given) in programs.items()}
        times = timing.in_turns(ways, rounds)
    evaluations, guided = chosen.evaluations, chosen.guided
    work = sum(flops.sample(config, size, evaluations, guided).values())
    found = {
        "what": "sample",
        "config": config.name,
        **rates.place(mesh),
        "batch_size": size,
        "steps": steps,
        "solver": chosen.solver,
        "guided": guided > 0,
        "dtype": config.train.dtype,
        **rates.of(times["cached"], size, work, mesh.size),
        **rates.memory(programs["cached"][0]),
    }
    if recompute:
        text = flops.forward(config)["llm"]
        more = work + text * (size * (evaluations + guided) - size - (guided > 0))
        found["recomputed"] = {
            **rates.of(times["recomputed"], size, more, mesh.size),
            "ratio": round(timing.ratio(times["recomputed"], times["cached"]), 4),
            "flop_ratio": round(more / work, 4),
        }
    return found


def compiled(
    config: ConfigDict, mesh: Any, size: int, chosen: options.Options, *, recompute: bool
) -> dict[str, tuple[Any, list[Any]]]:
    """{'cached': (program, its arguments)}, and 'recomputed' where asked for."""
    own = sampler.make(config, build.make_autoencoder(config), chosen)
    arguments = _arguments(config, mesh, size, chosen)
    given = {"cached": (own, arguments)}
    if recompute:
        other = own._replace(model=Recomputing(own.model))
        given["recomputed"] = other, _with_text_side(arguments)
    return {
        name: (sampler.draw.lower(static, *rest.values()).compile(), list(rest.values()))
        for name, (static, rest) in given.items()
    }


def _arguments(config: ConfigDict, mesh: Any, size: int, chosen: options.Options) -> dict[str, Any]:
    """What the program takes, behind the sampler."""
    abstract = sampler.abstract_arguments(config, mesh, chosen, size)
    everywhere = sharding.replicated(mesh)
    key = jax.device_put(jax.random.key(0), everywhere)
    numbers, level = np.arange(size, dtype=np.int32), np.float32(chosen.start)
    number_B, level, rows = sharding.put((numbers, level, sampler.table(chosen)), everywhere)
    made = {"start": sampler.Start(key, number_B, level), "rows": rows}
    rest = {name: x for name, x in abstract.items() if name not in made}
    vocabulary = min(config.llm.vocab_size, config.clip.vocab_size)
    made |= synthetic.like(rest, vocabulary)
    return {name: made[name] for name in abstract}


def _with_text_side(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, the language model among the trained parameters, too."""
    weights = arguments["weights"]
    params = weights["params"] | {"llm": weights["frozen"]["llm"]}
    return arguments | {"weights": weights | {"params": params}}


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` in lines."""
    lines = [
        f"{found['config']}, sampling, {found['batch_size']} images in {found['steps']} steps, "
        f"{found['dtype']}, on {rates.where(found)}",
        "  " + rates.line("batch", found),
    ]
    if told := rates.memory_line(found):
        lines.append(f"  {told}")
    if again := found.get("recomputed"):
        lines += [
            "  " + rates.line("the text read at every step", again),
            f"  that takes {again['ratio']:.3f} x the time; by FLOPs {again['flop_ratio']:.3f} x",
        ]
    return "\n".join(lines)
