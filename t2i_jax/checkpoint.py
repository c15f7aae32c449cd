"""Checkpoints on disk; the only module that knows orbax.

    <workdir>/checkpoints/<step>/
        params/  ema/  optimizer/   arrays, sharded as they were
        meta/                       {format_version, step, config, digests, crc32}: JSON
    <workdir>/damaged_checkpoints/
        <step>/, <step>.txt         a checkpoint that could not be read, and why

`optimizer` holds the optimiser's state and the step. The data position is the step (see
t2i_jax/data/loader.py). Saving is asynchronous: arrays leave the devices before `save` returns, and
a step's directory gets its name (on gs://, where that would be a copy, its `commit_success.txt`)
when everything in it is written: what a killed run leaves is no checkpoint. Arrays and JSON are all
that is ever read: nothing is unpickled.

The format of the arrays notices a file that is cut or lost, not a bit that is wrong inside one. So
every array has its digest (t2i_jax/digest.py), taken on the devices before it leaves them and again
when it is back, on whatever mesh; and the rest of meta/ has a checksum.
"""

from collections.abc import Iterator
import contextlib
import json
import sys
from typing import Any
import zlib

from etils import epath
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from t2i_jax import config as config_lib
from t2i_jax import digest
from t2i_jax.damage import DamagedError, StorageError, damage, forget, reason_of, tell_once
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.stored_arrays import StoredArray, absolute, tree_sources
from t2i_jax.training.state import TrainState

FORMAT_VERSION = 2
_FORMATS = (1, FORMAT_VERSION)  # that are read; 1 had no digests
_PIECE = 64_000_000  # bytes: an array is stored in pieces of about this size, cut between layers
WEIGHTS = ("ema", "params")
_ITEMS = ("params", "ema", "optimizer", "meta")
_ASIDE = "damaged_checkpoints"


class Checkpoints:
    """The checkpoints of a run.

    With `keep` they can be written: that many of the newest are kept, and with `keep_every` those
    of its multiples for ever.
    """

    def __init__(self, workdir: epath.PathLike, keep: int | None = None, keep_every: int = 0):
        tell_once()
        self._workdir = absolute(workdir)
        self.directory = self._workdir / "checkpoints"
        policies = ocp.checkpoint_managers.preservation_policy
        kept = [policies.LatestN(keep)]  # counts those of multiples, too
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=keep is not None,
            enable_async_checkpointing=keep is not None,
        )
        self._arrays = {name: ocp.StandardCheckpointHandler() for name in _ITEMS[:3]}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, handler in self._arrays.items():
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        self._json = ocp.JsonCheckpointHandler()
        registry.add("meta", ocp.args.JsonSave, self._json)
        registry.add("meta", ocp.args.JsonRestore, self._json)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, handler_registry=registry
        )
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, config: ConfigDict) -> None:
        """Starts saving; returns when the arrays may be overwritten. Raises as `wait`."""
        self.wait()
        trees = _items(state)
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": config_lib.to_json(config),
            "digests": {name: digest.digests(tree) for name, tree in trees.items()},
        }
        meta["crc32"] = _crc32(meta)
        items = {name: _in_layers(tree) for name, tree in trees.items()}
        self._saving = step
        with self._told_once():
            self._manager.save(
                step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True
            )

    def check(self) -> None:
        """Raises StorageError as soon as it is known that a save has failed; waits for nothing."""
        # Not `check_for_errors`: it takes the error from the thread that deletes old checkpoints
        # unless there was one.
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for what is being saved. Raises StorageError where that cannot be written."""
        if self._saving is not None:
            with self._told_once():
                self._manager.wait_until_finished()
            self._saving = None

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """Any failure of saving as one StorageError; what there is of it goes."""
        try:
            yield
            return
        except Exception as error:
            reason = reason_of(error)
            forget(error)
        step, self._saving = self._saving, None
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # other parts of it may still be written
                for path in self._unfinished():
                    path.rmtree(missing_ok=True)
        self._manager.reload()  # it has forgotten those that it would have deleted
        good = self.steps()
        raise StorageError(
            f"Checkpoint {step} could not be written to {self.directory}: {reason}. "
            + (f"Checkpoint {good[-1]} is intact. " if good else "There is none before it. ")
            + "Make room for it, or repair the disk, and start again."
        )

    def _unfinished(self) -> list[epath.Path]:
        if not self.directory.exists():
            return []
        return [
            path
            for path in self.directory.iterdir()
            if path.name.partition(".")[0].isdigit() and ocp.utils.is_tmp_checkpoint(path)
        ]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at a step; shapes, dtypes and shardings as in `like` (abstract).

        Every process calls it. Raises DamagedError in all of them where one cannot read its part,
        or where an array is not what was saved.
        """
        problem, trees, expected = "", None, None
        try:
            meta = self._meta(step)
            trees = {name: self._read(step, name, tree) for name, tree in _items(like).items()}
            expected = meta.get("digests")
        except DamagedError as error:
            problem = str(error)
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.array([bool(problem)])).ravel()
            if failed.any() and not problem:
                problem = f"process {np.flatnonzero(failed)[0]} cannot read its part"
        if not problem:
            problem = _differing(trees, expected)
        if problem:
            raise DamagedError(problem)
        optimizer = trees.pop("optimizer")
        return TrainState(**trees, **optimizer)

    def restore_newest(self, like: TrainState) -> TrainState | None:
        """The state of the newest checkpoint that is good; None where there is none at all.

        What is newer, and damaged or unfinished, is put aside, and told. Raises DamagedError, and
        touches nothing, where all are damaged.
        """
        bad: dict[int, str] = {}
        state = None
        for step in _agreed(self.steps()[::-1]):
            try:
                state = self.restore(step, like)
                break
            except DamagedError as error:
                bad[step] = str(error)
        if bad and state is None:
            raise DamagedError(
                f"No checkpoint in {self.directory} is good; nothing was changed. Put a good one "
                "there, or start anew in another --workdir.\n  "
                + "\n  ".join(f"{step}: {problem}" for step, problem in bad.items())
            )
        self._put_aside(bad, "checkpoint " + str(step) if state is not None else "the beginning")
        return state

    def _put_aside(self, bad: dict[int, str], instead: str) -> None:
        """Process 0 moves damaged checkpoints away, and deletes unfinished ones; all are told."""
        for step, problem in bad.items():
            _warn(f"checkpoint {step} of {self.directory} is damaged: {problem}")
        if jax.process_index() == 0:
            for step, problem in bad.items():
                to = self._workdir / _ASIDE / str(step)
                while to.exists():
                    to = to.with_name(to.name + "+")
                to.parent.mkdir(exist_ok=True)
                # Also because on gs:// a folder is there only with a file in it.
                to.with_name(f"{to.name}.txt").write_text(f"{problem}\n")
                (self.directory / str(step)).rename(to)
                _warn(f"checkpoint {step} is now {to}; going on from {instead}")
            for path in self._unfinished():
                path.rmtree(missing_ok=True)
                _warn(f"{path} was never finished, and is deleted; going on from {instead}")
        multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        self._manager.reload()

    def weights(self, step: int, which: str, like: Any) -> Any:
        """The 'ema' or 'params' of a step alone; `like` and errors as in `restore`."""
        if which not in WEIGHTS:
            raise ValueError(f"Unknown weights {which!r}; known: {WEIGHTS}.")
        where = self.directory / str(step)
        with _told_as(where):
            meta, tree = self._meta(step), self._read(step, which, like)
            if problem := _differing({which: tree}, meta.get("digests")):
                raise DamagedError(problem)
        return tree

    def arrays(self, step: int, which: str) -> dict[str, np.ndarray]:
        """Path -> array of the 'ema' or 'params' of a step, read whole: for small ones.

        Raises DamagedError where one is not what was saved.
        """
        with _told_as(self.directory / str(step)):
            expected = self._meta(step).get("digests")
            with damage(which):
                found = {path: x.read() for path, x in self.sources(step, which).items()}
            if problem := _differing({which: found}, expected):
                raise DamagedError(problem)
        return found

    def sources(self, step: int, which: str) -> dict[str, StoredArray]:
        """Path -> array of the 'ema' or 'params' of a step, none of them read yet."""
        return tree_sources(self.directory / str(step) / which)

    def config(self, step: int) -> ConfigDict:
        """The config that a checkpoint was made with. Raises ConfigError for a newer format."""
        with _told_as(self.directory / str(step)):
            return config_lib.from_json(self._meta(step)["config"])

    def _meta(self, step: int) -> dict[str, Any]:
        where = self.directory / str(step)
        with damage("meta"):
            meta = self._json.restore(where / "meta", args=ocp.args.JsonRestore())
            version = meta["format_version"]
        if version not in _FORMATS:
            raise ConfigError(
                f"{where} has checkpoint format {version}; "
                f"this version of t2i_jax reads formats {_FORMATS}."
            )
        if version > 1 and meta.pop("crc32", None) != _crc32(meta):
            raise DamagedError("meta: the checksum is not that of what was saved")
        return meta

    def _read(self, step: int, name: str, like: Any) -> Any:
        """One item. Not through the manager: that waits for processes which may have failed."""
        with damage(name):
            return self._arrays[name].restore(
                self.directory / str(step) / name, args=ocp.args.StandardRestore(like)
            )

    def close(self) -> None:
        """Waits for what is being saved. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _items(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    return {"params": state.params, "ema": state.ema, "optimizer": optimizer}


def _crc32(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _differing(trees: dict[str, Any], expected: dict[str, dict[str, int]] | None) -> str:
    """What to say of arrays that are not those that were saved; '' where all are."""
    if expected is None:
        return ""
    names = [
        f"{item}/{name}"
        for item, tree in trees.items()
        for name in digest.changed(tree, expected[item])
    ]
    return f"{', '.join(names[:5])}: not the numbers that were saved" if names else ""


def _agreed(steps: list[int]) -> Iterator[int]:
    """The steps that process 0 sees, in every process."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.resize(np.array([*steps, -1], np.int32), count)
    yield from multihost_utils.broadcast_one_to_all(mine).tolist()


@contextlib.contextmanager
def _told_as(where: epath.Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise DamagedError(
            f"{where} is damaged: {error}. Give an older checkpoint of its folder."
        ) from error


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def find(path: epath.PathLike) -> tuple[epath.Path, int]:
    """(working directory, step) of the checkpoint at `path`.

    `path` is a working directory (its newest complete checkpoint) or <workdir>/checkpoints/<step>.
    Raises MissingError that says what is there instead.
    """
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.exists():
        if not _complete(path):
            raise MissingError(f"{path} was never finished. Give another checkpoint of its folder.")
        return path.parent.parent, int(path.name)
    directory = path / "checkpoints"
    found = directory.iterdir() if directory.exists() else ()
    steps = [int(p.name) for p in found if _complete(p)]
    if steps:
        return path, max(steps)
    nearby = directory if directory.exists() else path if path.exists() else path.parent
    there = sorted(p.name for p in nearby.iterdir())[:10] if nearby.exists() else []
    raise MissingError(
        f"No checkpoint at {path}: expected {directory}/<step>. "
        f"{nearby} holds {there or 'nothing'}. "
        "`python launch/train.py --config=... --workdir=DIR` makes one."
    )


def _complete(path: epath.Path) -> bool:
    return path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)


def has_tree(path: epath.PathLike) -> bool:
    """Whether there is a tree that `save_tree` has written to its end."""
    return ocp.utils.is_checkpoint_finalized(path)


def save_tree(path: epath.PathLike, tree: Any) -> None:
    """Writes a tree of arrays as a directory, in the place of one that is there.

    Raises StorageError where that cannot be.
    """
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        try:
            checkpointer.save(absolute(path), args=_in_layers(tree), force=True)
        except Exception as error:
            raise StorageError(f"{path} could not be written: {reason_of(error)}.") from error


def _in_layers(tree: Any) -> ocp.args.StandardSave:
    """To be saved in pieces of some layers each, so that `StoredArray` can read one at a time."""
    pieces, whole = ocp.SaveArgs(chunk_byte_size=_PIECE, shard_axes=(0,)), ocp.SaveArgs()
    save_args = jax.tree.map(lambda x: pieces if x.nbytes > _PIECE else whole, tree)
    return ocp.args.StandardSave(tree, save_args=save_args)


def load_tree(path: epath.PathLike, like: Any) -> Any:
    """Reads a tree written by `save_tree`, with shapes, dtypes and shardings as in `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(absolute(path), like)
