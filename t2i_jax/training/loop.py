"""The training loop: set up, resume, step, watch, save."""

from collections.abc import Iterator
import contextlib
import functools
import math
from typing import Any

from etils import epath
from flax.core import meta
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np
import optax

from t2i_jax import base_model, build, checkpoint, convert, distributed, frozen, plan, sharding
from t2i_jax import config as configs
from t2i_jax.data import loader, sources
from t2i_jax.data.bad import Cause
from t2i_jax.data.samples import Fault
from t2i_jax.data.tar import Damage
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import UserError
from t2i_jax.models import lora
from t2i_jax.pipeline import Pipeline, trained_params
from t2i_jax.progress import Progress
from t2i_jax.training import pretrain, profile, program, state, wandb_log
from t2i_jax.training import workdir as workdirs
from t2i_jax.training.feed import feed
from t2i_jax.training.guard import Guard
from t2i_jax.training.held_out import validation_samples
from t2i_jax.training.parts import Parts
from t2i_jax.training.watch import NonFiniteError, Watch

_LOST = str(Cause.UNREADABLE)
_SHOWN = 10  # damaged files that a message names


class SetupError(UserError):
    """Something that a run needs is not there; the message says what, where, and what to do."""


def train(config: ConfigDict, workdir: epath.PathLike) -> state.TrainState:
    """Runs `config` in `workdir`, from its newest checkpoint if there is one, to its last step.

    Raises SetupError where files are missing, NonFiniteError where training diverges,
    PreemptedError when it has stopped because of SIGTERM, StorageError where it cannot write.
    """
    workdir = epath.Path(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    _say(plan.describe(config, workdir, mesh))
    start, saved = config.weights.start, workdir / "checkpoints"
    with distributed.together():
        resumed = saved.exists() and any(saved.iterdir())  # and needs no start any more
        if config.lora.rank:
            base_model.require(start)
        elif start and not resumed and not epath.Path(start).exists():
            raise SetupError(f"weights.start = {start!r}: no such directory.")
        if jax.process_index() == 0:  # which alone writes
            wandb_log.check(config.train.wandb)
        train_source, validation_source = open_data(config)
        workdirs.claim(config, workdir, train_source)
    with distributed.together():
        distributed.check_shared(workdir / "config.json", configs.to_json(config))
    keep = config.checkpoint.keep, config.checkpoint.keep_every
    with (
        Guard(config, workdir) as guard,
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(workdir, *keep) as saved,
    ):
        guard.meet("the tokenizer")
        make_tokenizer(config, workdir, train_source)
        make_language_model(config, workdir, mesh, train_source, guard)
        with guard.setup():
            parts = assemble(config, workdir, mesh, train_source, validation_source, saved)
        with parts.train_loader:
            return _run(parts, saved, guard)


def open_data(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
    """(training, validation) sources; raises SetupError naming every missing file of the run."""
    problems = frozen.missing(config)
    try:
        opened = tuple(sources.make_source(config, split) for split in sources.SPLITS)
    except (FileNotFoundError, ImportError, ValueError) as error:
        problems.append(str(error))
    else:
        problems += _damage(opened[0], config.data.max_bad_rate)
    if problems:
        raise SetupError("\n\n".join(problems))
    return opened


def _damage(source: sources.Mixture, max_rate: float) -> list[str]:
    """A message where more of the files are damaged than the config allows."""
    damaged = {file for file, _ in source.damage}
    if len(damaged) <= max_rate * source.files:
        return []
    shown = [f"{_bytes(*lost)}: {lost[1].reason}" for lost in source.damage]
    return [
        f"{len(damaged)} of {source.files} files are damaged, more than data.max_bad_rate = "
        f"{max_rate:g}; samples in them are lost. Download or write them again, or raise the "
        "limit:\n  " + "\n  ".join(shown[:_SHOWN])
    ]


def _bytes(file: str, damage: Damage) -> str:
    return f"{file}, bytes {damage.start} to {damage.stop}"


def make_tokenizer(config: ConfigDict, workdir, source: sources.Source) -> None:
    """Trains a tokenizer on the captions, where the config asks for one and none is there.

    Every process does the same; one writes.
    """
    path = frozen.tokenizer_path(config, workdir)
    if not config.weights.tokenizer and not Tokenizer.is_saved(path):
        tokenizer = frozen.train_tokenizer(config, source)
        if jax.process_index() == 0:
            tokenizer.save(path)
        _say(f"tokenizer: {tokenizer.vocab_size} tokens, trained on the captions")
    multihost_utils.sync_global_devices("tokenizer")


def make_language_model(config: ConfigDict, workdir, mesh, source, guard: Guard) -> None:
    """Pre-trains a language model on the captions, where the config asks and none is there."""
    if config.weights.llm or checkpoint.has_tree(frozen.llm_path(workdir)):
        return
    tokenizer = Tokenizer.load(frozen.tokenizer_path(config, workdir))
    like = build.sharded(build.abstract_params(config)[1], mesh)["llm"]
    params = init_part(config, mesh, state.Stream.LLM, ("llm",))["llm"]
    c = config.pretrain
    batches = loader.text_batches(
        source, tokenizer, config.data.max_text_tokens, c.batch_size, config.seed, c.steps
    )
    # Every process makes the whole batch of captions: they are few, and cheap.
    everywhere = sharding.replicated(mesh)
    steps = pretrain.pretrain(
        build.model(config),
        params,
        (sharding.put(batch, everywhere) for batch in batches),
        steps=c.steps,
        learning_rate=c.learning_rate,
    )
    kind = {"name": "language model", "unit": "captions", "shown": jax.process_index() == 0}
    with guard.pretraining(), Progress(c.steps, images=c.batch_size, **kind) as bar:
        for i, (trained, loss) in enumerate(steps, 1):
            params = trained
            if i % 10 == 0 or i == c.steps:
                norm = float(optax.tree.norm(params))
                if not math.isfinite(float(loss) + norm):
                    raise NonFiniteError(
                        f"Step {i} of the language model: loss {float(loss)}, parameter norm "
                        f"{norm}. Nothing of it was saved. Lower pretrain.learning_rate, or look "
                        "at the captions."
                    )
                bar.update(i, loss=float(loss))
                guard.meet(f"pre-training the language model after step {i}")
        params = jax.tree.map(lambda x, s: x.astype(s.dtype), params, like)
        checkpoint.save_tree(frozen.llm_path(workdir), params)


def first_params(config: ConfigDict, mesh, like: Any) -> Any:
    """What is trained, before the first step, in the places of the (abstract) tree `like`."""
    if config.lora.rank:
        key = jax.random.fold_in(jax.random.key(config.seed), state.Stream.INIT)
        boxed, _ = build.abstract_params(config)
        places = jax.tree.map(lambda x: x.sharding, like)
        return jax.jit(lambda key: lora.init(key, boxed), out_shardings=places)(key)
    if config.weights.start:
        return trained_params(convert.open_model(config.weights.start), config, like)
    return init_part(config, mesh, state.Stream.INIT, tuple(like))


def load_base(config: ConfigDict, workdir, like: Any, *, new: bool) -> Any:
    """The model that low-rank factors are for, in the dtypes and places of `like`.

    It is the one that the run began on; a `new` run notes which that is.
    """
    base = convert.open_base(config, workdir, new=new)
    params = trained_params(base, config, like)
    if new:
        with distributed.together():
            if jax.process_index() == 0:
                base_model.keep(base, workdir)
    return params


def init_part(config: ConfigDict, mesh, stream: state.Stream, names) -> Any:
    """Freshly initialised parts of the parameters, float32, created sharded; no other is made."""
    trained, fixed = build.abstract_params(config)
    like = {**build.sharded(trained, mesh), "llm": build.sharded(fixed["llm"], mesh)}
    key = jax.random.fold_in(jax.random.key(config.seed), stream)
    model, shape = build.model(config), build.latent_shape(config)
    shardings = jax.tree.map(lambda x: x.sharding, {name: like[name] for name in names})

    def init(key):
        params = meta.unbox(build.fusion.init(model, key, shape))
        return {name: params[name] for name in shardings}

    return jax.jit(init, out_shardings=shardings)(key)


def assemble(config, workdir, mesh, train_source, validation_source, saved) -> Parts:
    """Loads what is frozen, creates or restores the state, and builds the jitted functions."""
    prompts, autoencoder, frozen_params = frozen.load(config, workdir, mesh)
    programs = program.make(config, mesh, autoencoder)
    current = saved.restore_newest(programs.state)
    if config.lora.rank:
        like = build.abstract_frozen(config, mesh)["base"]
        frozen_params["base"] = load_base(config, workdir, like, new=current is None)
    if current is None:
        current = programs.create(first_params(config, mesh, programs.state.params))
    _check_validation(config, validation_source, mesh)
    train_loader = loader.Loader(
        train_source,
        prompts,
        config.data,
        config.train.batch_size,
        config.seed,
        sharding.local_rows(mesh, config.train.batch_size),
    )
    _check_loader(train_loader, config, len(train_source))
    return Parts(
        config,
        workdir,
        mesh,
        Pipeline(config, autoencoder, prompts, current.ema, frozen_params, mesh),
        train_loader,
        validation_source,
        tuple(Fault(-1, -1, _bytes(*lost), _LOST, lost[1].reason) for lost in train_source.damage),
        current,
        programs,
    )


def _check_validation(config: ConfigDict, source: sources.Mixture, mesh) -> None:
    """Raises SetupError where there is nothing to validate on."""
    samples = len(validation_samples(config, source)) if config.validation.every else 0
    if config.validation.every and samples < sharding.batch_shards(mesh):
        size = config.data.image_size
        raise SetupError(
            f"Of {len(source)} held-out latents {samples} are of {size} x {size} pixels, on which "
            "validation looks; raise data.validation_size, or set validation.every to 0."
        )


def _check_loader(train_loader: loader.Loader, config: ConfigDict, samples: int) -> None:
    """Raises SetupError where more samples than the config allows belong to no bucket."""
    lost = train_loader.left_out
    if len(lost) > config.data.max_bad_rate * samples:
        shown = [f"{fault.sample}: {fault.cause}, {fault.detail}" for fault in lost[:_SHOWN]]
        raise SetupError(
            f"{len(lost)} of {samples} samples have no size that can be read, more than "
            f"data.max_bad_rate = {config.data.max_bad_rate:g}. The first:\n  " + "\n  ".join(shown)
        )
    # A host with other files would see another order, and nobody would notice.
    multihost_utils.assert_equal(
        np.frombuffer(train_loader.digest, np.uint32),
        "The hosts see other data: other files, or images of other sizes, under the same names.",
    )


def _run(parts: Parts, saved: checkpoint.Checkpoints, guard: Guard) -> state.TrainState:
    """Steps from the state's step to the last one; the step just dispatched is never waited for."""
    config, mesh, current = parts.config, parts.mesh, parts.state
    programs, fixed = parts.programs, parts.pipeline.frozen
    start, last = int(current.step), config.train.steps
    if start:
        _say(f"resumed at step {start} of {last}")
    root = jax.random.key(config.seed)
    rng = jax.random.fold_in(root, state.Stream.TRAIN)
    with distributed.together():
        watch = Watch(parts, start, guard.goodput)
    alone = jax.process_count() == 1
    batches = feed(
        parts.train_loader.batches(start),
        mesh,
        config.data.text_buckets,
        None if alone else lambda: guard.asked,
    )
    batches = watch.meter.batches(batches)
    apart = functools.partial(_apart, guard, watch)
    with profile.Profile(config.profile, parts.workdir, apart) as tracer:
        for number, batch in zip(range(start + 1, last + 1), batches, strict=False):
            with tracer.step(number, guard.step(number, batch.arrays)):
                arrays = programs.encoded(fixed, batch.arrays)
                current, metrics = programs.train_step(current, fixed, arrays, rng)
                watch.dispatched(number, metrics, batch.faults)
            if number == start + 1:
                watch.settle()
                guard.ready(start)
            if _due(number, config.validation.every, last):
                with apart("validation"):
                    watch.validate(number, current)
            if _due(number, config.sampling.every, last):
                with apart("drawing"):
                    watch.draw(number, current)
            if _due(number, config.evaluation.every, last):
                with apart("evaluation"):
                    watch.evaluate(number, current)
            saved.check()
            stop = guard.asked if alone else watch.asked
            if stop or _due(number, config.checkpoint.every, last):
                watch.settle()  # nothing that is not finite is ever saved
                with guard.saving(), watch.meter.pause("checkpoint"):
                    watch.flush()
                    saved.save(number, current, config)
            if stop and number < last:
                watch.leave()
                with guard.pause("the last checkpoint"):
                    saved.wait()
                raise guard.stopped()
    guard.leaving()
    with distributed.together():  # the others wait for what the first one writes
        watch.close()
    return current


@contextlib.contextmanager
def _apart(guard: Guard, watch: Watch, what: str) -> Iterator[None]:
    """What is no step: the pending one is done first, and the time of `what` is not theirs."""
    watch.settle()
    with guard.pause(what), watch.meter.pause(what):
        yield


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _due(number: int, every: int, last: int) -> bool:
    return every > 0 and (number % every == 0 or number == last)
