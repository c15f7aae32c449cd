"""What a run does not train: tokenizers, language model, autoencoder, CLIP.

They come from where `config.weights` says, or, where an entry is '', were made by the run itself
from the captions of its data and lie in its working directory:

    <workdir>/tokenizer/    tokenizer.json
    <workdir>/llm/          parameters of the pre-trained language model
"""

from collections.abc import Iterator
import contextlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, checkpoint, sharding
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError
from t2i_jax.interop.autoencoder import load_autoencoder
from t2i_jax.interop.clip import load_clip
from t2i_jax.interop.directory import fetch_command, find_weights
from t2i_jax.interop.llm import load_llm
from t2i_jax.models.autoencoder import Autoencoder


def tokenizer_path(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Where the tokenizer is, or will be."""
    return epath.Path(config.weights.tokenizer or epath.Path(workdir) / "tokenizer")


def llm_path(workdir: epath.PathLike) -> epath.Path:
    """Where a language model that the run pre-trains is, or will be."""
    return epath.Path(workdir) / "llm"


def missing(config: ConfigDict) -> list[str]:
    """One message for every file that the config names and that is not there."""
    problems = []
    if config.weights.llm:
        problems += find_weights(config.weights.llm, "llm")
    if config.weights.tokenizer:
        try:
            Tokenizer.load(config.weights.tokenizer)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    if config.autoencoder.kind != "identity":
        problems += find_weights(config.weights.autoencoder, "autoencoder")
    if config.dit.pooled_width:
        absent = find_weights(config.weights.clip, "clip")
        try:
            _clip_tokenizer(config)
        except (FileNotFoundError, ValueError) as error:
            absent = absent or [str(error)]  # one command fetches both
        problems += absent
    return problems


def _clip_tokenizer(config: ConfigDict) -> Tokenizer | None:
    """CLIP's tokenizer, where the DiT is conditioned on its embedding."""
    if not config.dit.pooled_width:
        return None
    path = epath.Path(config.weights.clip)
    tokenizer = Tokenizer.load(path / "tokenizer", fetch_command(path, "clip"))
    if tokenizer.vocab_size > config.clip.vocab_size:
        raise ConfigError(
            f"The tokenizer in {path} has {tokenizer.vocab_size} tokens, more than "
            f"clip.vocab_size = {config.clip.vocab_size}."
        )
    return tokenizer


def load(
    config: ConfigDict, workdir: epath.PathLike, mesh: Mesh
) -> tuple[Prompts, Autoencoder, dict[str, Any]]:
    """Tokenizers, autoencoder and the frozen parameters, sharded.

    These are {'llm', 'autoencoder'}, and 'clip' where the DiT is conditioned on its embedding.
    Raises FileNotFoundError or ValueError that names the file.
    """
    prompts = _prompts(config, tokenizer_path(config, workdir))
    _, boxed = build.abstract_params(config)
    dtype = jnp.dtype(config.train.frozen_dtype)
    params = {}
    llm = build.sharded(boxed["llm"], mesh)
    if config.weights.llm:
        with _users_files():
            params["llm"] = load_llm(config.weights.llm, config.llm, _places(llm), dtype)
    else:
        params["llm"] = checkpoint.load_tree(llm_path(workdir), llm)
    if config.dit.pooled_width:
        places = _places(build.sharded(boxed["clip"], mesh))
        with _users_files():
            _, params["clip"] = load_clip(config.weights.clip, config.clip, places, dtype)
    if config.autoencoder.kind == "identity":
        return prompts, build.make_autoencoder(config), {**params, "autoencoder": {}}
    with _users_files():
        net, params["autoencoder"] = load_autoencoder(
            config.weights.autoencoder,
            dtype,
            config=config.autoencoder,
            shardings=sharding.replicated(mesh),  # its architecture is in its files
        )
    net = net.clone(dtype=jnp.dtype(config.train.dtype))
    return prompts, build.make_autoencoder(config, net), params


def _prompts(config: ConfigDict, path: epath.Path) -> Prompts:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.llm.vocab_size:
        raise ConfigError(
            f"The tokenizer in {path} has {tokenizer.vocab_size} tokens, "
            f"more than llm.vocab_size = {config.llm.vocab_size}."
        )
    with _users_files():
        clip = _clip_tokenizer(config), config.clip.max_tokens
        prompts = Prompts(tokenizer, config.data, *clip)
    if prompts.length > config.llm.max_tokens:  # the config's own rule does not know the tokenizer
        raise ConfigError(
            f"data.max_text_tokens and the instruction make rows of {prompts.length} tokens, more "
            f"than llm.max_tokens = {config.llm.max_tokens}."
        )
    return prompts


def _places(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


@contextlib.contextmanager
def _users_files() -> Iterator[None]:
    """What is wrong with files that the user gave is the user's to know, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
