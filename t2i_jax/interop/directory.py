"""Hugging Face weight directories: where the files are, what config.json says.

`find_weights` is for preflights and loads nothing; `find` is what the loaders of this folder start
from. Only safetensors are read, never pickles, and only from the directory that was named.
"""

from collections.abc import Callable, Iterable
import json
import math
import shlex
from typing import Any

from etils import epath
import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax

_SD3 = "stabilityai/stable-diffusion-3-medium-diffusers --include "
_SOURCES = {
    "autoencoder": _SD3 + '"vae/*"',
    "clip": _SD3 + '"text_encoder/*" "tokenizer/*"',
    "clip_model": "openai/clip-vit-large-patch14",
    "transformer": "ooutlierr/fuse-dit",
}
_KINDS = ("llm", *_SOURCES)
_FOLDERS = {
    "autoencoder": "vae",
    "clip": "text_encoder",
    "transformer": "transformer",
}  # where a diffusers pipeline has them
_OWNERS = {"gemma-": "google", "paligemma-": "google", "Qwen3-": "Qwen"}  # of repositories
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEX = ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weights(path: epath.PathLike, kind: str) -> list[str]:
    """What keeps the weights at `path` from being loaded; [] where they are all there.

    `kind` is 'llm', 'autoencoder', 'clip' (its text encoder), 'clip_model' (both of its encoders)
    or 'transformer', a published model's. Looks which files there are; opens an index at most.
    """
    if kind not in _KINDS:
        raise ValueError(f"Unknown kind of weights {kind!r}; known: {list(_KINDS)}.")
    try:
        find(path, kind)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    return []


def fetch_command(path: epath.PathLike, kind: str) -> str:
    """What to type to get weights of the kind, and what comes with them, into `path`.

    A language model's repository is told from the name of its directory ('weights/gemma-2-2b'), as
    far as that goes.
    """
    path = epath.Path(path)
    source = _SOURCES.get(kind)
    if source is None:
        owners = (owner for start, owner in _OWNERS.items() if path.name.startswith(start))
        source = next((shlex.quote(f"{owner}/{path.name}") for owner in owners), "OWNER/NAME")
    return f"hf download {source} --local-dir {shlex.quote(str(path))}"


def find(path: epath.PathLike, kind: str) -> tuple[epath.Path, list[epath.Path]]:
    """The directory of the weights and the safetensors files in it; all exist."""
    directory = target = epath.Path(path).expanduser()
    if folder := _FOLDERS.get(kind):  # downloaded as a folder of a pipeline
        target = directory.parent if directory.name == folder else directory
        if (directory / folder / "config.json").exists():
            directory = directory / folder

    def missing(what):
        return FileNotFoundError(
            f"No {kind} weights in {directory}: {what}. Fetch them (their licence is to be "
            f"accepted on the Hub first, then `hf auth login`):\n    {fetch_command(target, kind)}"
        )

    if not directory.is_dir():
        raise missing("there is no such directory")
    if not (directory / "config.json").exists():
        raise missing("it has no config.json")
    try:
        return directory, _files(directory)
    except FileNotFoundError as error:
        raise missing(str(error)) from error


def find_files(directory: epath.Path) -> list[epath.Path]:
    """The safetensors files of a directory: one, or those that its index names. All exist."""
    try:
        return _files(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"No weights in {directory}: {error}.") from error


def _files(directory: epath.Path) -> list[epath.Path]:
    for name in _NAMES:
        if (directory / name).exists():
            return [directory / name]
    for name in _NAMES:
        if (directory / (name + _INDEX)).exists():
            names = sorted(set(_weight_map(directory / (name + _INDEX)).values()))
            absent = [name for name in names if not (directory / name).exists()]
            if absent:
                raise FileNotFoundError(f"its index names {', '.join(absent)}, not there")
            return [directory / name for name in names]
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise FileNotFoundError(
            f"it has only pickles ({', '.join(pickles)}), which can run code and are never "
            "opened; safetensors are read"
        )
    raise FileNotFoundError(f"it has neither {' nor '.join(_NAMES)} (nor their {_INDEX})")


def _weight_map(index: epath.Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded model."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map.")
    for name in files.values():
        plain = isinstance(name, str) and not set("/\\\0") & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; only *.safetensors beside it are read."
            )
    return files


def read_json(file: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object.")
    return content


def shapes_of(init: Callable[..., Any], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what a module's `init` makes."""
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    params = nn.meta.unbox(variables["params"])
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def check_fields(
    directory: epath.Path, fields: Iterable[tuple[str, Any, str, Any]], file: str = "config.json"
) -> None:
    """Raises ValueError naming every (our field, value, their field, value) that disagrees."""

    def same(a, b):
        return a == b or (isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-6))

    wrong = [f"{o} is {a!r}, {t} {b!r}" for o, a, t, b in fields if not same(a, b)]
    if wrong:
        raise ValueError(
            f"The config and {directory / file} disagree: {'; '.join(wrong)}. Set the "
            "config to what the weights are, or name the directory of others."
        )
