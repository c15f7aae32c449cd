"""What a run does not train: tokenizer, language model, autoencoder.

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
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError
from t2i_jax.interop.autoencoder import load_autoencoder
from t2i_jax.interop.directory import find_weights
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
    return problems


def load(
    config: ConfigDict, workdir: epath.PathLike, mesh: Mesh
) -> tuple[Tokenizer, Autoencoder, dict[str, Any]]:
    """Tokenizer, autoencoder and the frozen parameters {'llm', 'autoencoder'}, sharded.

    Raises FileNotFoundError or ValueError that names the file.
    """
    _, boxed = build.abstract_params(config)
    like = build.sharded(boxed["llm"], mesh)
    dtype = jnp.dtype(config.train.frozen_dtype)
    path = tokenizer_path(config, workdir)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.llm.vocab_size:
        raise ConfigError(
            f"The tokenizer in {path} has {tokenizer.vocab_size} tokens, "
            f"more than llm.vocab_size = {config.llm.vocab_size}."
        )
    if config.weights.llm:
        with _users_files():
            places = jax.tree.map(lambda x: x.sharding, like)
            llm = load_llm(config.weights.llm, config.llm, places, dtype)
    else:
        llm = checkpoint.load_tree(llm_path(workdir), like)
    if config.autoencoder.kind == "identity":
        return tokenizer, build.make_autoencoder(config), {"llm": llm, "autoencoder": {}}
    with _users_files():
        net, params = load_autoencoder(
            config.weights.autoencoder,
            dtype,
            config=config.autoencoder,
            shardings=sharding.replicated(mesh),  # its architecture is in its files
        )
    net = net.clone(dtype=jnp.dtype(config.train.dtype))
    return tokenizer, build.make_autoencoder(config, net), {"llm": llm, "autoencoder": params}


@contextlib.contextmanager
def _users_files() -> Iterator[None]:
    """What is wrong with files that the user gave is the user's to know, without a traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
