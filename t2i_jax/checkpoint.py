"""Checkpoints on disk; the only module that knows orbax.

    <workdir>/checkpoints/<step>/
        params/  ema/  optimizer/   arrays, sharded as they were
        meta/                       {format_version, step, config}: JSON

`optimizer` holds the optimiser's state and the step. The data position is the step (see
t2i_jax/data/loader.py). Saving is asynchronous: arrays leave the devices before `save` returns, and
a step's directory gets its name when everything in it is written, so a killed run leaves complete
checkpoints only. Arrays and JSON are all that is ever read: nothing is unpickled.
"""

import dataclasses
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from t2i_jax import config as config_lib
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.training.state import TrainState

FORMAT_VERSION = 1
_PIECE = 64_000_000  # bytes: an array is stored in pieces of about this size, cut between layers
_CACHE = 512_000_000  # bytes of pieces that are kept while the layers in them are asked for
WEIGHTS = ("ema", "params")
_ITEMS = ("params", "ema", "optimizer", "meta")


class Checkpoints:
    """The checkpoints of a run, newest kept."""

    def __init__(self, workdir: epath.PathLike, keep: int | None = None):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, enable_async_checkpointing=keep is not None
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS[:3]}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, handler in handlers.items():
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        json = ocp.JsonCheckpointHandler()
        registry.add("meta", ocp.args.JsonSave, json)
        registry.add("meta", ocp.args.JsonRestore, json)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, handler_registry=registry
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, config: ConfigDict) -> None:
        """Starts saving; returns when the arrays may be overwritten."""
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": config_lib.to_json(config),
        }
        trees = {
            "params": state.params,
            "ema": state.ema,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
        }
        items = {name: _in_layers(tree) for name, tree in trees.items()}
        self._manager.save(
            step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at a step; shapes, dtypes and shardings as in `like` (abstract)."""
        self.config(step)
        trees = {
            "params": like.params,
            "ema": like.ema,
            "optimizer": {"step": like.step, "opt_state": like.opt_state},
        }
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(
            step=got["optimizer"]["step"],
            params=got["params"],
            ema=got["ema"],
            opt_state=got["optimizer"]["opt_state"],
        )

    def weights(self, step: int, which: str, like: Any) -> Any:
        """The 'ema' or 'params' of a step alone; `like` as in `restore`."""
        if which not in WEIGHTS:
            raise ValueError(f"Unknown weights {which!r}; known: {WEIGHTS}.")
        items = {which: ocp.args.StandardRestore(like)}
        return self._manager.restore(step, args=ocp.args.Composite(**items))[which]

    def sources(self, step: int, which: str) -> dict[str, "StoredArray"]:
        """Path -> array of the 'ema' or 'params' of a step, none of them read yet."""
        return tree_sources(self.directory / str(step) / which)

    def config(self, step: int) -> ConfigDict:
        """The config that a checkpoint was made with. Raises ValueError for a newer format."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=items)["meta"]
        if meta["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{self.directory / str(step)} has checkpoint format {meta['format_version']}; "
                f"this version of t2i_jax reads format {FORMAT_VERSION}."
            )
        return config_lib.from_json(meta["config"])

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def find(path: epath.PathLike) -> tuple[epath.Path, int]:
    """(working directory, step) of the checkpoint at `path`.

    `path` is a working directory (its newest checkpoint) or <workdir>/checkpoints/<step>. Raises
    MissingError that says what is there instead.
    """
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.exists():
        return path.parent.parent, int(path.name)
    directory = path / "checkpoints"
    steps = (
        [int(p.name) for p in directory.iterdir() if p.name.isdigit()] if directory.exists() else []
    )
    if steps:
        return path, max(steps)
    nearby = directory if directory.exists() else path if path.exists() else path.parent
    there = sorted(p.name for p in nearby.iterdir())[:10] if nearby.exists() else []
    raise MissingError(
        f"No checkpoint at {path}: expected {directory}/<step>. "
        f"{nearby} holds {there or 'nothing'}. "
        "`python launch/train.py --config=... --workdir=DIR` makes one."
    )


def save_tree(path: epath.PathLike, tree: Any) -> None:
    """Writes a tree of arrays as a directory that appears when it is complete."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(epath.Path(path).absolute(), args=_in_layers(tree))


def _in_layers(tree: Any) -> ocp.args.StandardSave:
    """To be saved in pieces of some layers each, so that `StoredArray` can read one at a time."""
    pieces, whole = ocp.SaveArgs(chunk_byte_size=_PIECE, shard_axes=(0,)), ocp.SaveArgs()
    save_args = jax.tree.map(lambda x: pieces if x.nbytes > _PIECE else whole, tree)
    return ocp.args.StandardSave(tree, save_args=save_args)


def load_tree(path: epath.PathLike, like: Any) -> Any:
    """Reads a tree written by `save_tree`, with shapes, dtypes and shardings as in `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(epath.Path(path).absolute(), like)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a saved tree, which a layer can be read of."""

    _store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        return self._store.shape

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return self._store.dtype.numpy_dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """`array[layer]`, or the whole."""
        part = self._store if layer is None else self._store[layer]
        return part.read().result()


def tree_sources(path: epath.PathLike) -> dict[str, StoredArray]:
    """Path ('dit/out/bias') -> array of a tree of nested dicts on disk, none of them read yet.

    Reads Orbax's format as it is documented: one zarr array a leaf, named after its keys with dots
    between them, all in one OCDBT database.
    """
    path = epath.Path(path).absolute().as_posix()
    base = path if "://" in path else f"file://{path}"
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    ends = "/.zarray"
    names = [k.decode().removesuffix(ends) for k in keys if k.decode().endswith(ends)]
    if not names:
        raise MissingError(f"There are no saved arrays in {path}.")

    def opened(name):
        place = {"driver": "ocdbt", "base": base, "path": name}
        return ts.open({"driver": "zarr", "kvstore": place}, context=context, read=True)

    waiting = {name.replace(".", "/"): opened(name) for name in names}
    return {name: StoredArray(store.result()) for name, store in waiting.items()}


def abstract(tree: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with shardings, for `restore`, `weights` and `load_tree`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
