"""Compiles what a run does for TPUs that are not there, and tells what it would do on them.

libtpu holds the compiler that a TPU machine uses; here it compiles the very functions that
launch/train.py and launch/sample.py run (training/program.py, sampler.py) for abstract devices.
What is told: whether it fits, what fills the memory, what travels between devices beside what must
(ideal.py), and how much is computed beside what the model needs.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
import functools
import re
import time
from typing import Any, NamedTuple

from flax.core import meta
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, flops, machines, options, plan, sampler, sharding
from t2i_jax.models.autoencoder import Autoencoder
from t2i_jax.speed import advice, hlo, ideal
from t2i_jax.training import program, step

Report = dict[str, Any]
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHOWN = 8  # of the largest arrays


class Compiled(NamedTuple):
    """What the compiler made of a program, or why it made nothing."""

    seconds: float
    program: Any  # jax.stages.Compiled, or None where it does not fit
    needed: float | None  # bytes of HBM; what the compiler says where it does not fit, if it does
    problem: str  # '' where it fits

    @property
    def temporary(self) -> float | None:
        """Bytes of HBM beside what the program is given; of one that does not fit, `needed`."""
        given = self.program.memory_analysis().argument_size_in_bytes if self.program else 0
        return self.needed and self.needed - given


def train(config: ConfigDict, topology: str, *, latents: bool = False) -> Report:
    """The report on a training step of `config` on `topology` (machines.parse), as a JSON tree.

    With `latents` the batch is one of stored latents. Raises ConfigError for a topology or mesh
    that cannot be.
    """
    machine, mesh = _machine(config, topology)
    plan.check(config, mesh)
    autoencoder = build.make_autoencoder(config)
    programs = program.make(config, mesh, autoencoder)
    fixed = build.abstract_frozen(config, mesh)
    batch = program.abstract_batch(config, mesh, latents=latents)
    with jax.set_mesh(mesh):
        taken = program.abstract_encoded(programs, fixed, batch)
    key = build.abstract_key(mesh)
    arguments = {"state": programs.state, "frozen": fixed, "batch": taken, "key": key}
    encoder = None
    if taken.keys() != batch.keys():
        parts, dtype = config.train.accumulation, config.train.frozen_dtype
        encoder = _encoder(autoencoder, dtype, parts, batch["image"].shape, mesh)
    how = {
        "batch_size": config.train.batch_size,
        "accumulation": config.train.accumulation,
        "remat": config.dit.remat,
    }
    return _report(
        Job("train", config, topology, machine, mesh, how),
        lambda: programs.train_step.lower(*arguments.values()),
        held(arguments),
        ideal.train_step(config, arguments, mesh),
        flops.train_step(config, latents=latents),
        encoder,
    )


@functools.lru_cache(maxsize=8)
def _encoder(
    autoencoder: Autoencoder, dtype: str, parts: int, shape: tuple[int, ...], mesh: Mesh
) -> Compiled:
    """The program that encodes images of this shape; the same for many configs."""

    def like(array_shape, dtype, place):
        return jax.ShapeDtypeStruct(array_shape, dtype, sharding=place)

    place, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    weights = jax.tree.map(
        lambda x: like(x.shape, dtype, whole), jax.eval_shape(autoencoder.init, jax.random.key(0))
    )
    encode = jax.jit(step.make_encode(autoencoder, parts), out_shardings=place)
    with jax.set_mesh(mesh):
        return compile_(encode.lower(meta.unbox(weights), like(shape, jnp.uint8, place)))


def sample(config: ConfigDict, topology: str) -> Report:
    """The report on drawing one batch, prompts to pixels, by the sampling section of `config`.

    `sampling.batch_size` images at once, all devices together, made a multiple of the devices.
    Low-rank factors are merged before anything is drawn.
    """
    config = config.copy_and_resolve_references().unlock()
    config.lora.rank = 0
    machine, mesh = _machine(config, topology)
    shards = sharding.batch_shards(mesh)
    batch, chosen = -(-config.sampling.batch_size // shards) * shards, options.resolve(config)
    sampler_ = sampler.make(config, build.make_autoencoder(config), chosen)
    arguments = sampler.abstract_arguments(config, mesh, chosen, batch)
    weights, text = arguments["weights"], arguments["text"]
    memory = {
        "parameters": sharding.bytes_per_device(weights["params"]),
        "frozen": sharding.bytes_per_device(weights["frozen"]),
        "batch": sharding.bytes_per_device(text),
    }
    how = {"batch_size": batch, "steps": config.sampling.steps}
    return _report(
        Job("sample", config, topology, machine, mesh, how),
        lambda: sampler.draw.lower(sampler_, *arguments.values()),
        memory,
        ideal.sample(arguments, chosen.evaluations, mesh, guided=chosen.guided > 0),
        flops.sample(config, batch, chosen.evaluations, chosen.guided),
    )


class Job(NamedTuple):
    """What is compiled, and for what."""

    what: str  # 'train' | 'sample'
    config: ConfigDict
    topology: str
    machine: machines.Topology
    mesh: Mesh
    how: dict[str, Any]  # batch and other sizes, as the report has them


def shards(config: ConfigDict, topology: str) -> int:
    """Into how many parts a batch of `config` is split there."""
    return sharding.batch_shards(_machine(config, topology)[1])


def _machine(config: ConfigDict, topology: str) -> tuple[machines.Topology, Mesh]:
    machine = machines.parse(topology)
    return machine, sharding.make_mesh(**config.mesh, devices=machines.devices(machine))


def _report(
    job: Job,
    lower: Callable[[], Any],
    memory: dict[str, int],
    must: dict[str, float],
    model: dict[str, float],
    encoder: Compiled | None = None,
) -> Report:
    """Lowers, compiles and reads.

    `memory` is what the arguments hold, `must` what must travel, `encoder` what runs before, while
    all of the arguments but the batch are there. 'peaks' has the most that each program needs.
    """
    chip, devices = machines.CHIPS[job.machine.chip], job.mesh.size
    with jax.set_mesh(job.mesh):
        elapsed = _stopwatch()
        lowered = lower()
        traced = elapsed()
        done = compile_(lowered)
    runs = [done, encoder] if encoder else [done]
    problem = " ".join(run.problem for run in runs if run.problem)
    peaks = {job.what: done.needed}
    if encoder:
        peaks["encoder"] = encoder.temporary and encoder.temporary + sum(memory.values())
    needed = None if None in peaks.values() else max(peaks.values())
    report = {
        "config": job.config.name,
        "what": job.what,
        "topology": job.topology,
        "devices": devices,
        "chip": job.machine.chip,
        "mesh": dict(job.mesh.shape),
        **job.how,
        "seconds": {
            "trace": round(traced, 1),
            "compile": round(done.seconds, 1),
            "compile encoder": round(encoder.seconds, 1) if encoder else 0,
        },
        "fits": not problem and needed <= chip.memory,
        "bytes_needed": needed,
        "bytes_there": chip.memory,
        "peaks": peaks,
        "model_flops_a_device": sum(model.values()) / devices,
    }
    if problem:
        report |= {"problem": problem, "memory": memory}
    else:
        parsed, *others = (hlo.Program(run.program.as_text()) for run in runs)
        report |= {
            "memory": memory | temporaries(done.program, parsed, job.config),
            **traffic([parsed, *others], must, devices),
            **work([parsed, *others], model, devices),
            "largest": _listed(parsed.largest(_SHOWN)),
            "scores": _listed(
                row for run in [parsed, *others] for row in run.across(score_lengths(job.config))
            ),
        }
    return report | {"suggestions": advice.suggestions(report, job.config)}


def score_lengths(config: ConfigDict) -> set[tuple[int, int]]:
    """(queries, keys) of what must never be an array: scores, or a mask of that size.

    Of the DiT, whose keys are text and image, and of the autoencoder. Image tokens that attend to
    text alone are left out: 1024 x 256 are the queries of a head, too.
    """
    height, width, _ = build.latent_shape(config)
    image = height * width // config.dit.patch_size**2
    joint = config.dit.attention == "joint"
    found = {(image, image + config.data.max_text_tokens * joint)}
    if config.autoencoder.kind != "identity":
        found |= {(side**2, side**2) for side in (height, config.autoencoder.tile) if side}
    return found


def _listed(rows: Iterable[tuple[hlo.Array, int, str]]) -> list[dict[str, Any]]:
    return [
        {"bytes": a.bytes, "type": f"{a.dtype}{list(a.shape)}", "count": n, "line": line}
        for a, n, line in rows
    ]


def compile_(lowered: Any) -> Compiled:
    """Runs the compiler; what does not fit is no error."""
    elapsed = _stopwatch()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        return Compiled(elapsed(), None, _needed(text), _first_lines(text))
    memory = compiled.memory_analysis()
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(elapsed(), compiled, needed, "")


def _stopwatch() -> Callable[[], float]:
    """Seconds from here on: by the clock, or of processors where other work has kept them away.

    One at least is busy all the time, so what this says is never less than a quiet machine takes.
    """
    clock, busy = time.perf_counter(), time.process_time()
    return lambda: min(time.perf_counter() - clock, time.process_time() - busy)


def _needed(text: str) -> float | None:
    """Bytes of HBM that the compiler says it would need; None where something else is too small."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", text)
    found = found or re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:500]


def held(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of a device for what a step is given."""
    state, bytes_ = arguments["state"], sharding.bytes_per_device
    return {
        "parameters": bytes_(state.params),
        "EMA": bytes_(state.ema),
        "optimiser": bytes_(state.opt_state),
        "frozen": bytes_(arguments["frozen"]),
        "batch": bytes_(arguments["batch"]),
    }


def temporaries(compiled: Any, parsed: hlo.Program, config: ConfigDict) -> dict[str, float]:
    """Bytes that a step needs beside: activations kept for the backward pass, and the rest."""
    memory = compiled.memory_analysis()
    total = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    away = memory.host_temp_size_in_bytes  # of dit.remat = 'offload'
    kept = min(parsed.stacked("jvp(", config.dit.num_layers), total)
    return {
        "activations": kept,
        "temporaries": max(total - kept, 0),
        "program": memory.generated_code_size_in_bytes,
        **({"in the host's memory": away} if away else {}),
    }


def traffic(runs: Sequence[hlo.Program], must: dict[str, float], devices: int) -> Report:
    """What travels, by kind, dtype and group; and beside it what must."""
    rows: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0, 0.0])
    for c in (c for run in runs for c in run.collectives(devices)):
        row = rows[c.kind, "+".join(c.dtypes), c.group, c.asynchronous]
        row[0] += c.count
        row[1] += c.bytes
    names = ("kind", "dtype", "devices", "asynchronous")
    found = [
        {**dict(zip(names, key, strict=True)), "count": count, "bytes": size}
        for key, (count, size) in sorted(rows.items(), key=lambda item: -item[1][1])
    ]
    total, least = sum(row["bytes"] for row in found), sum(must.values())
    return {
        "collectives": found,
        "collective_bytes": total,
        "ideal_bytes": must,
        "collective_ratio": total / least if least else None,
    }


def work(runs: Sequence[hlo.Program], model: dict[str, float], devices: int) -> Report:
    """FLOPs of the compiled programs, of all devices, beside those of the model."""
    found: Counter[str] = Counter()
    for run in runs:
        found.update({part: count * devices for part, count in run.flops().items()})
    return {
        "flops": {"model": model, "compiled": dict(found)},
        "flops_ratio": sum(found.values()) / sum(model.values()),
    }
