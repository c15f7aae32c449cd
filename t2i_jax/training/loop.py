"""The training loop: set up, resume, step, watch, save."""

from collections.abc import Iterator
import json
import math
from typing import Any, NamedTuple

from etils import epath
from flax.core import meta
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np
import optax

from t2i_jax import build, checkpoint, convert, frozen, plan, sharding
from t2i_jax import config as configs
from t2i_jax.data import loader, sources
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.evaluation import pictures
from t2i_jax.pipeline import Pipeline, trained_params
from t2i_jax.progress import Progress
from t2i_jax.training import optimizer, pretrain, state, step
from t2i_jax.training.metrics import MetricWriter, read_metrics

# What a run may change when it is started again in its working directory; and train.steps, where
# the schedule does not end with it.
_MAY_CHANGE = (
    "name",
    "weights.",
    "autoencoder.tile",
    "data.path",
    "data.num_threads",
    "data.prefetch",
    "train.log_every",
    "checkpoint.",
    "validation.",
    "sampling.",
    "mesh.",
)
_TOKENIZER_CAPTIONS = 5_000  # captions that a tokenizer is trained on


class SetupError(UserError):
    """Something that a run needs is not there; the message says what, where, and what to do."""


class NonFiniteError(UserError):
    """The loss or the gradient is no longer a number."""


class Parts(NamedTuple):
    """Everything that a run is made of."""

    config: ConfigDict
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    pipeline: Pipeline  # model, autoencoder, tokenizers and frozen parameters
    train_loader: loader.Loader
    validation_source: sources.Source
    state: state.TrainState
    train_step: Any  # jitted
    validate: Any  # jitted


def train(config: ConfigDict, workdir: epath.PathLike) -> state.TrainState:
    """Runs `config` in `workdir`, from its newest checkpoint if there is one, to its last step.

    Raises SetupError where files are missing, NonFiniteError where training diverges.
    """
    workdir = epath.Path(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    _say(plan.describe(config, workdir, mesh))
    start, saved = config.weights.start, workdir / "checkpoints"
    resumed = saved.exists() and any(saved.iterdir())  # and needs no start any more
    if start and not resumed and not epath.Path(start).exists():
        raise SetupError(f"weights.start = {start!r}: no such directory.")
    train_source, validation_source = open_data(config)
    claim(config, workdir, len(train_source))
    with jax.set_mesh(mesh), checkpoint.Checkpoints(workdir, config.checkpoint.keep) as saved:
        make_text_side(config, workdir, mesh, train_source)
        parts = assemble(config, workdir, mesh, train_source, validation_source, saved)
        with parts.train_loader:
            return _run(parts, saved)


def claim(config: ConfigDict, workdir: epath.Path, samples: int) -> None:
    """Makes a working directory that of `config`, in <workdir>/config.json, and of its data.

    Raises ConfigError where it holds a run of another config, but for keys that a resumed run may
    change, or of another number of training samples: a position would mean another sample.
    """
    files = {"config.json": configs.to_json(config), "data.json": json.dumps({"samples": samples})}
    made = any((workdir / part).exists() for part in ("tokenizer", "llm", "checkpoints"))
    if made and (workdir / "config.json").exists():
        before = configs.from_json((workdir / "config.json").read_text())
        if changed := _changes(before, config):
            raise ConfigError(
                f"{workdir} holds a run of another config: {'; '.join(changed)}. "
                "Set these back, or give another --workdir."
            )
    if made and (workdir / "data.json").exists():
        was = json.loads((workdir / "data.json").read_text())["samples"]
        if was != samples:
            raise ConfigError(
                f"{workdir} holds a run on {was} training samples, now there are {samples}: which "
                "were held out, and which came when, would differ. Give the data as it was, or "
                "another --workdir."
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            new = workdir / f"{name}.new"
            new.write_text(text)
            new.replace(workdir / name)


def _changes(before: ConfigDict, now: ConfigDict) -> list[str]:
    """What a run that is resumed must not change, and `now` does."""
    was, wanted = configs.flat(before), configs.flat(now)
    free = _MAY_CHANGE
    if now.optimizer.schedule == "constant":
        free += ("train.steps",)
    return [
        f"{key} = {wanted.get(key)!r}, was {was.get(key)!r}"
        for key in sorted(was.keys() | wanted.keys())
        if was.get(key) != wanted.get(key)
        # Files may move; made by the run itself, or not, is another model.
        and not (key.startswith(free) and (was.get(key) == "") == (wanted.get(key) == ""))
    ]


def open_data(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
    """(training, validation) sources; raises SetupError naming every missing file of the run."""
    problems = frozen.missing(config)
    try:
        opened = tuple(sources.make_source(config, split) for split in sources.SPLITS)
    except (FileNotFoundError, ImportError, ValueError) as error:
        problems.append(str(error))
    if problems:
        raise SetupError("\n\n".join(problems))
    return opened


def make_text_side(config: ConfigDict, workdir, mesh, source: sources.Source) -> None:
    """Trains tokenizer and language model on the captions, where the config asks and none is there.

    Every process does the same; one writes.
    """
    path = frozen.tokenizer_path(config, workdir)
    if not config.weights.tokenizer and not path.exists():
        captions = sources.captions(source, _TOKENIZER_CAPTIONS, config.seed)
        tokenizer = Tokenizer.train(captions, config.pretrain.vocab_size)
        if jax.process_index() == 0:
            tokenizer.save(path)
        _say(f"tokenizer: {tokenizer.vocab_size} tokens, trained on the captions")
    multihost_utils.sync_global_devices("tokenizer")
    if config.weights.llm or frozen.llm_path(workdir).exists():
        return
    tokenizer = Tokenizer.load(path)
    like = build.sharded(build.abstract_params(config)[1], mesh)["llm"]
    params = init_part(config, mesh, state.Stream.LLM, ("llm",))["llm"]
    c = config.pretrain
    batches = loader.text_batches(
        source, tokenizer, config.data.max_text_tokens, c.batch_size, config.seed, c.steps
    )
    # Every process makes the whole batch of captions: they are few, and cheap.
    put = sharding.replicated(mesh)
    steps = pretrain.pretrain(
        build.model(config),
        params,
        (jax.device_put(batch, put) for batch in batches),
        steps=c.steps,
        learning_rate=c.learning_rate,
    )
    with Progress(c.steps, images=c.batch_size, name="language model", unit="captions") as bar:
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
    params = jax.tree.map(lambda x, s: x.astype(s.dtype), params, like)
    checkpoint.save_tree(frozen.llm_path(workdir), params)


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
    model = build.model(config)
    boxed, _ = build.abstract_params(config)
    trained = build.sharded(boxed, mesh)
    update, rate = optimizer.make(config.optimizer, config.train.steps, boxed)
    whole = jax.eval_shape(lambda p: state.create(p, update), trained)
    shardings = state.shardings(whole, trained, mesh)
    if saved.steps():
        like = checkpoint.abstract(whole, shardings)
        current = saved.restore(saved.steps()[-1], like)
    else:
        if config.weights.start:
            params = trained_params(convert.open_model(config.weights.start), config, mesh)
        else:
            params = init_part(config, mesh, state.Stream.INIT, tuple(trained))
        create = jax.jit(lambda p: state.create(p, update), out_shardings=shardings)
        current = create(params)
    objective = step.Objective(model, autoencoder, **config.flow, clip=build.clip(config))
    train_step = step.make_train_step(
        objective,
        update,
        rate,
        accumulation=config.train.accumulation,
        ema=config.ema,
    )
    train_loader = loader.Loader(
        train_source,
        prompts,
        config.data,
        config.train.batch_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )
    return Parts(
        config,
        workdir,
        mesh,
        Pipeline(config, model, autoencoder, prompts, current.ema, frozen_params, mesh),
        train_loader,
        validation_source,
        current,
        jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        jax.jit(step.make_validation(objective, tuple(config.validation.timesteps))),
    )


def _run(parts: Parts, saved: checkpoint.Checkpoints) -> state.TrainState:
    """Steps from the state's step to the last one; the step just dispatched is never waited for."""
    config, mesh, current = parts.config, parts.mesh, parts.state
    start, last = int(current.step), config.train.steps
    if start:
        _say(f"resumed at step {start} of {last}")
    root = jax.random.key(config.seed)
    rng = jax.random.fold_in(root, state.Stream.TRAIN)
    watch = _Watch(parts, start)
    batches = parts.train_loader.batches(start)
    for number, batch in zip(range(start + 1, last + 1), batches, strict=False):
        batch = sharding.shard_batch(batch, mesh)
        current, metrics = parts.train_step(current, parts.pipeline.frozen, batch, rng)
        watch.dispatched(number, metrics)
        if _due(number, config.validation.every, last):
            watch.validate(number, current)
        if _due(number, config.sampling.every, last):
            watch.draw(number, current)
        if _due(number, config.checkpoint.every, last):
            watch.settle()  # nothing that is not finite is ever saved
            saved.save(number, current, config)
    watch.close()
    return current


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _due(number: int, every: int, last: int) -> bool:
    return every > 0 and (number % every == 0 or number == last)


class _Watch:
    """Reads metrics one step behind, checks and writes them; draws and validates on request."""

    def __init__(self, parts: Parts, start: int):
        self._parts, config = parts, parts.config
        self._pending: tuple[int, Any] | None = None
        self._shown: dict[str, float] = {}
        self._main = jax.process_index() == 0
        self._writer = MetricWriter(parts.workdir, start) if self._main else None
        self._bar = Progress(config.train.steps, start, config.train.batch_size)

    def dispatched(self, number: int, metrics: Any) -> None:
        """A step is under way: looks at the one before it."""
        self.settle()
        self._pending = (number, metrics)

    def settle(self) -> None:
        """Waits for the pending step. Raises NonFiniteError where it is not finite."""
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            self._finish()
            raise NonFiniteError(
                f"Step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"update norm {values['update_norm']}. "
                "Nothing of it was saved; the newest checkpoint is intact. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the data."
            )
        config = self._parts.config.train
        if number % config.log_every == 0 or number == config.steps:
            self._write(number, values)
        self._shown["loss"] = values["loss"]
        self._bar.update(number, **self._shown)

    def validate(self, number: int, current: state.TrainState) -> None:
        """Loss of the averaged weights on the held-out samples, at fixed times and noise."""
        self.settle()
        parts, config = self._parts, self._parts.config
        key = jax.random.fold_in(jax.random.key(config.seed), state.Stream.VALIDATION)
        losses = []
        for i, batch in enumerate(_validation_batches(parts)):
            batch = sharding.shard_batch(batch, parts.mesh)
            rng = jax.random.fold_in(key, i)
            losses.append(parts.validate(current.ema, parts.pipeline.frozen, batch, rng))
        loss = np.mean([np.asarray(x) for x in losses], axis=0)
        by_time = {
            f"validation_loss_t{t:g}": float(x)
            for t, x in zip(config.validation.timesteps, loss, strict=True)
        }
        self._write(number, {"validation_loss": float(np.mean(loss)), **by_time})
        self._shown["validation"] = float(np.mean(loss))

    def draw(self, number: int, current: state.TrainState) -> None:
        """Pictures of `sampling.prompts` by the averaged weights."""
        self.settle()
        prompts = list(self._parts.config.sampling.prompts)
        images = self._parts.pipeline._replace(params=current.ema).draw(prompts)
        if self._main:
            picture = np.asarray(pictures.grid(images, prompts, columns=min(4, len(prompts))))
            path = self._parts.workdir / "samples" / f"step_{number:07d}.png"
            self._writer.image(number, "samples", picture, path)

    def close(self) -> None:
        """After the last step: what is pending, and loss.png."""
        self.settle()
        self._finish()
        if self._main:
            metrics = read_metrics(self._parts.workdir)
            if any("loss" in entry for entry in metrics):
                pictures.loss_plot(metrics, self._parts.workdir / "loss.png")

    def _finish(self) -> None:
        self._bar.close()
        if self._main:
            self._writer.close()

    def _write(self, number: int, values: dict[str, float]) -> None:
        if self._main:
            self._writer.scalars(number, values)


def _validation_batches(parts: Parts) -> Iterator[Any]:
    """The held-out samples in order, this process's rows; what fills no batch is left out."""
    config = parts.config
    size = min(config.train.batch_size, len(parts.validation_source))
    size -= size % sharding.batch_shards(parts.mesh)
    rows = size // jax.process_count()
    first = jax.process_index() * rows
    held_out = loader.Loader(
        parts.validation_source, parts.pipeline.prompts, config.data, rows, config.seed
    )
    for start in range(0, len(parts.validation_source) - size + 1, size):
        yield held_out.fixed_batch(range(start + first, start + first + rows))
