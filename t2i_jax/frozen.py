"""What a run does not train: tokenizers, language model, autoencoder, CLIP.

They come from where `config.weights` says, which may be directories of their publishers or ones
that launch/convert.py made, or, where an entry is '', were made by the run itself from the captions
of its data and lie in its working directory:

    <workdir>/tokenizer/    tokenizer.json
    <workdir>/llm/          parameters of the pre-trained language model
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from etils import epath
from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, quantization, sharding
from t2i_jax.data import sources
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError, users_files
from t2i_jax.interop import native
from t2i_jax.interop.autoencoder import open_autoencoder
from t2i_jax.interop.clip import open_clip
from t2i_jax.interop.directory import check_fields, fetch_command, find_weights
from t2i_jax.interop.llm import open_llm, same_scale
from t2i_jax.interop.mapping import Mapped, Source, materialise
from t2i_jax.interop.stored import of_part, prefixed
from t2i_jax.models.autoencoder import Autoencoder, AutoencoderKL
from t2i_jax.stored_arrays import tree_sources

_TOKENIZER_CAPTIONS = 5_000  # captions that a tokenizer is trained on
PARTS = ("llm", "autoencoder", "clip")
_NOT_OF_THE_FILES = ("unroll", "softcap_shared", "tile")  # keys that say how, not what
_AT_MOST = ("num_layers", "max_tokens")  # may be less than the files have


class Frozen(NamedTuple):
    """What a run does not train, on disk."""

    weights: dict[str, Source]  # by whole paths: 'llm/blocks/...'
    network: AutoencoderKL | None  # of the autoencoder, where it has weights
    tokenizer: epath.Path
    clip_tokenizer: epath.Path | None


def tokenizer_path(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Where the tokenizer is, or will be."""
    if config.weights.tokenizer:
        path = epath.Path(config.weights.tokenizer)
        return path / native.TOKENIZER if native.is_native(path) else path
    return epath.Path(workdir) / "tokenizer"


def llm_path(workdir: epath.PathLike) -> epath.Path:
    """Where a language model that the run pre-trains is, or will be."""
    return epath.Path(workdir) / "llm"


def train_tokenizer(config: ConfigDict, source: sources.Source) -> Tokenizer:
    """What a run without weights.tokenizer makes of the captions of its data."""
    captions = sources.captions(source, _TOKENIZER_CAPTIONS, config.seed)
    return Tokenizer.train(captions, config.pretrain.vocab_size)


def _clip_tokenizer_path(config: ConfigDict) -> epath.Path | None:
    """Where CLIP's tokenizer is, if the DiT is conditioned on its embedding."""
    if not config.dit.pooled_width:
        return None
    path = epath.Path(config.weights.clip)
    return path / (native.CLIP_TOKENIZER if native.is_native(path) else "tokenizer")


def missing(config: ConfigDict) -> list[str]:
    """One message for every file that the config names and that is not there."""
    problems = []
    if config.weights.llm:
        problems += _missing(config.weights.llm, "llm")
    if config.weights.tokenizer:
        try:
            Tokenizer.load(tokenizer_path(config, ""))
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    if config.autoencoder.kind != "identity":
        problems += _missing(config.weights.autoencoder, "autoencoder")
    if config.dit.pooled_width:
        absent = _missing(config.weights.clip, "clip")
        try:
            _clip_tokenizer(config, _clip_tokenizer_path(config))
        except (FileNotFoundError, ValueError) as error:
            absent = absent or [str(error)]  # one command fetches both
        problems += absent
    return problems


def _missing(path: str, part: str) -> list[str]:
    if not native.is_native(path):
        return find_weights(path, part)
    try:
        parts = native.read_card(path)["parts"]
    except (ValueError, KeyError) as error:
        return [str(error)]
    return [] if part in parts else [f"{path} holds {', '.join(parts)}, and no {part}."]


def open_parts(config: ConfigDict, workdir: epath.PathLike) -> Frozen:
    """What the config names, checked against it; no weight is read.

    Raises ConfigError that names the file.
    """
    with users_files():
        if config.weights.llm:
            found = prefixed("llm", _open(config, "llm")[0])
        else:
            found = prefixed("llm", tree_sources(llm_path(workdir)))
        network = None
        if config.autoencoder.kind != "identity":
            part, network = _open(config, "autoencoder")
            found |= prefixed("autoencoder", part)
        if config.dit.pooled_width:
            found |= prefixed("clip", _open(config, "clip")[0])
    tokenizers = tokenizer_path(config, workdir), _clip_tokenizer_path(config)
    return Frozen(found, network, *tokenizers)


def _open(config: ConfigDict, part: str) -> tuple[dict[str, Source], Any]:
    """(Sources of a part under its own paths, its network if that is in the files)."""
    path, section = config.weights[part], config[part]
    if native.is_native(path):
        stored = native.open_native(path)
        theirs = stored.config.get(part, {})
        if part not in stored.parts:
            raise FileNotFoundError(f"{path} holds {', '.join(stored.parts)}, and no {part}.")
        rows = [
            (f"{part}.{key}", value, key, theirs[key])
            for key, value in section.items()
            if key in theirs and key not in _NOT_OF_THE_FILES
            if not (key in _AT_MOST and value <= theirs[key])
            if not (key == "query_scalar" and same_scale(section, theirs))
        ]
        check_fields(epath.Path(path), rows, native.CARD)
        found = stored.part(part)
        if part == "llm":
            found = {p: _first_layers(source, section.num_layers) for p, source in found.items()}
        return found, stored.autoencoder
    if part == "llm":
        return open_llm(path, section), None
    if part == "clip":
        return open_clip(path, section)[1], None
    network, _, found = open_autoencoder(path, section)
    return found, network


def _first_layers(source: Mapped, layers: int) -> Mapped:
    if not source.rule.stacked:
        return source
    shape = (layers, *source.shape[1:])
    return dataclasses.replace(source, shape=shape, tensors=source.tensors[:layers])


def load(
    config: ConfigDict, workdir: epath.PathLike, mesh: Mesh
) -> tuple[Prompts, Autoencoder, dict[str, Any]]:
    """Tokenizers, autoencoder and the frozen parameters, sharded.

    These are {'llm', 'autoencoder'}, and 'clip' where the DiT is conditioned on its embedding.
    Raises FileNotFoundError or ValueError that names the file.
    """
    tokenizers = tokenizer_path(config, workdir), _clip_tokenizer_path(config)
    prompts = make_prompts(config, *tokenizers)
    found = open_parts(config, workdir)
    return prompts, *place(config, mesh, found.weights, found.network)


def load_autoencoder(config: ConfigDict, mesh: Mesh) -> tuple[Autoencoder, Any]:
    """The autoencoder alone, and its parameters. Raises ConfigError that names the file."""
    if problems := _missing(config.weights.autoencoder, "autoencoder"):
        raise ConfigError("\n".join(problems))
    with users_files():
        found, network = _open(config, "autoencoder")
    autoencoder, params = place(config, mesh, prefixed("autoencoder", found), network)
    return autoencoder, params["autoencoder"]


def place(
    config: ConfigDict, mesh: Mesh, weights: Mapping[str, Source], network: AutoencoderKL | None
) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder and the frozen parameters on the devices, as the config has them stored."""
    _, boxed = build.abstract_params(config)
    held = build.quantised(config, boxed)
    dtype = jnp.dtype(config.train.frozen_dtype)
    params = {"autoencoder": {}}
    with users_files():
        for part in PARTS:
            if not (found := of_part(part, weights)):
                continue
            places, matrices = sharding.replicated(mesh), {}
            if part != "autoencoder":  # whose architecture is in its files, not in the config
                _check(part, boxed[part], found)
                places = jax.tree.map(lambda x: x.sharding, build.sharded(held[part], mesh))
            if held[part] is not boxed[part]:
                matrices = quantization.matrices(boxed[part])
            params[part] = materialise(found, places, dtype, matrices)
    return build.make_autoencoder(config, network), params


def _check(part: str, boxed: Any, found: Mapping[str, Source]) -> None:
    """Raises ValueError where the parameters of a part are not the config's."""
    like = flatten_dict(meta.unbox(boxed), sep="/")
    shapes = {path: x.shape for path, x in like.items()}
    if shapes != (there := {path: source.shape for path, source in found.items()}):
        wrong = [p for p in sorted({*shapes, *there}) if shapes.get(p) != there.get(p)]
        is_, wanted = (kept.get(wrong[0], "missing") for kept in (there, shapes))
        raise ValueError(f"The {part} is not the config's: {wrong[0]} is {is_}, not {wanted}.")


def make_prompts(
    config: ConfigDict, tokenizer: epath.Path, clip_tokenizer: epath.Path | None
) -> Prompts:
    """What makes tokens of captions. Raises ConfigError where config and tokenizer disagree."""
    with users_files():
        words = Tokenizer.load(tokenizer)
    if words.vocab_size > config.llm.vocab_size:
        raise ConfigError(
            f"The tokenizer in {tokenizer} has {words.vocab_size} tokens, "
            f"more than llm.vocab_size = {config.llm.vocab_size}."
        )
    with users_files():
        clip = _clip_tokenizer(config, clip_tokenizer), config.clip.max_tokens
        prompts = Prompts(words, config.data, *clip)
    if prompts.length > config.llm.max_tokens:  # the config's own rule does not know the tokenizer
        raise ConfigError(
            f"data.max_text_tokens and the instruction make rows of {prompts.length} tokens, more "
            f"than llm.max_tokens = {config.llm.max_tokens}."
        )
    return prompts


def _clip_tokenizer(config: ConfigDict, path: epath.Path | None) -> Tokenizer | None:
    """CLIP's tokenizer, where the DiT is conditioned on its embedding."""
    if path is None:
        return None
    tokenizer = Tokenizer.load(path, fetch_command(config.weights.clip, "clip"))
    if tokenizer.vocab_size > config.clip.vocab_size:
        raise ConfigError(
            f"The tokenizer in {path} has {tokenizer.vocab_size} tokens, more than "
            f"clip.vocab_size = {config.clip.vocab_size}."
        )
    return tokenizer
