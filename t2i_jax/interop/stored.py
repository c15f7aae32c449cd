"""A model on disk, whatever its format: what converting, comparing and loading start from.

A reader makes a `Stored` of a directory, looking at its JSON and at the headers of its weights; a
writer makes of a `Stored` the `Files` of another format. Readers and writers know nothing of each
other. `write` then moves the tensors, one at a time.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any
import uuid

from etils import epath
import jax.numpy as jnp

from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError
from t2i_jax.interop import autoencoder, clip, llm, reference, safetensors
from t2i_jax.interop.mapping import Source
from t2i_jax.models import fusion
from t2i_jax.models.autoencoder import AutoencoderKL
from t2i_jax.models.clip import CLIPText
from t2i_jax.models.llm import from_config

PARTS = ("dit", "memory", "llm", "autoencoder", "clip")  # first words of our parameters' paths
WEIGHTS_LIMIT = 2_000_000_000  # bytes of one file of weights


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a directory holds; no weight is read yet.

    Attributes:
      where: the directory.
      layout: what it is, for people: 'checkpoint', 'published pipeline', ...
      config: our config's sections, all of them for a whole model, else those of its part.
      weights: path ('dit/blocks/mlp/up/weight') -> source, of the parts that are there.
      autoencoder: its network, where there is one with weights.
      tokenizer, clip_tokenizer: directories, or None.
      step: of training, where that is known.
      averaged: whether the trained weights are the EMA; None: not known.
    """

    where: epath.Path
    layout: str
    config: Mapping[str, Any]
    weights: Mapping[str, Source]
    autoencoder: AutoencoderKL | None = None
    tokenizer: epath.Path | None = None
    clip_tokenizer: epath.Path | None = None
    step: int | None = None
    averaged: bool | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a text-to-image model, and not a part for one."""
        return "dit" in self.parts

    @property
    def parts(self) -> list[str]:
        """Of PARTS, those that are there."""
        there = {path.split("/")[0] for path in self.weights}
        return [part for part in PARTS if part in there]

    def part(self, name: str) -> dict[str, Source]:
        """The sources of one part, under paths of its own."""
        return of_part(name, self.weights)


def expected_shapes(
    config: Mapping[str, Any], net: AutoencoderKL | None, parts: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of these parts, as a config has them.

    `net` is the autoencoder's network. Raises ValueError or TypeError for a section that is none.
    """
    found = {}
    if "dit" in parts:
        sections = {name: config[name] for name in ("llm", "memory", "dit")}
        channels = config["autoencoder"]["channels"]
        found |= reference.shapes(fusion.build(**sections, channels=channels), llm=True)
    elif "llm" in parts:
        found |= prefixed("llm", llm.shapes(from_config(config["llm"])))
    if "autoencoder" in parts:
        found |= prefixed("autoencoder", autoencoder.shapes(net))
    if "clip" in parts:
        found |= prefixed("clip", clip.shapes(CLIPText(**config["clip"])))
    return found


def prefixed(part: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the paths of one part, under whole paths."""
    return {f"{part}/{path}": source for path, source in found.items()}


def of_part(part: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to one part, under paths of its own: `prefixed` undone."""
    return {p.removeprefix(f"{part}/"): s for p, s in found.items() if p.startswith(f"{part}/")}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What goes into one folder under one name, in as many files as it takes."""

    folder: str  # '' is the directory itself
    stem: str  # 'model' or 'diffusion_pytorch_model'
    entries: list[safetensors.Entry]


@dataclasses.dataclass(frozen=True)
class Files:
    """A directory that is to be written: weights, texts, and tokenizers.

    A tokenizer is written as it is read here, special tokens and all, as a tokenizer.json.
    """

    weights: list[Weights]
    texts: Mapping[str, str]  # path in the directory -> content
    tokenizers: Mapping[str, epath.Path | None]  # folder -> where it is read from; None: none

    def size(self, dtype: str) -> int:
        """Bytes of the weights."""
        kind = jnp.dtype(dtype)
        return sum(entry.size(kind) for part in self.weights for entry in part.entries)


def write(
    files: Files,
    out: epath.PathLike,
    dtype: str,
    progress: Callable[[int], None] | None = None,
) -> epath.Path:
    """Writes a directory that appears when it is complete; nothing of it is left otherwise.

    `dtype` is that of the weights. `progress` is called with the bytes written since it was last.
    Raises ConfigError where there is something at `out`, ValueError where a weight is no number.
    """
    out = epath.Path(out)
    free(out)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, text in files.texts.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text)
        for folder, source in files.tokenizers.items():
            if source is not None:
                Tokenizer.load(source).save(temporary / folder)
        for part in files.weights:
            (temporary / part.folder).mkdir(parents=True, exist_ok=True)
            safetensors.write(
                temporary / part.folder,
                part.stem,
                part.entries,
                dtype,
                max_bytes=WEIGHTS_LIMIT,
                progress=progress,
            )
        temporary.rename(out)
    except BaseException:
        if temporary.exists():
            temporary.rmtree()
        raise
    return out


def free(out: epath.Path) -> None:
    """Raises ConfigError where there is something at `out`, or it is no place on a disk."""
    if "://" in out.as_posix():  # where no directory appears at once
        raise ConfigError(f"{out}: name a directory on a disk, and copy it from there.")
    if out.exists():
        raise ConfigError(f"{out} is there already; nothing is replaced: name another --out.")
