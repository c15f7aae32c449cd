"""Our own directories of weights: what others' are imported to, and the export 'safetensors'.

    DIR/t2i_jax.json          the card: what the weights are, with the config that they go with
    DIR/model.safetensors     or numbered parts and their index
    DIR/tokenizer/, DIR/clip_tokenizer/    where a language model or CLIP is among them

Tensors have our names and our axes; what has all layers in one array here is one tensor a layer
there, so that no tensor is larger than a layer: 'dit/blocks/mlp/up/weight' is
'dit.blocks.0.mlp.up.weight', 'dit.blocks.1.mlp.up.weight', ...
"""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.interop import autoencoder, mapping, safetensors
from t2i_jax.interop.directory import find_files, read_json
from t2i_jax.interop.mapping import Rule
from t2i_jax.interop.stored import (
    PARTS,
    Files,
    Stored,
    Weights,
    expected_shapes,
)

CARD = "t2i_jax.json"
FORMAT_VERSION = 1
TOKENIZER, CLIP_TOKENIZER = "tokenizer", "clip_tokenizer"
_LAYERS = ("blocks", "layers")  # what is below these has all layers in one array
_LETTERS = "abcdefgh"


def is_native(path: epath.PathLike) -> bool:
    """Whether `path` is such a directory, and not an export that only has a card."""
    path = epath.Path(path)
    return (path / CARD).is_file() and not (path / "model_index.json").exists()


def read_card(path: epath.PathLike) -> dict[str, Any]:
    """The card of a directory. Raises ValueError where it is none that this version reads."""
    file = epath.Path(path) / CARD
    card = read_json(file)
    if card.get("format_version") != FORMAT_VERSION or not isinstance(card.get("config"), dict):
        raise ValueError(
            f"{file} has format {card.get('format_version')!r}; this version of t2i_jax reads "
            f"format {FORMAT_VERSION}, with a config."
        )
    return card


def card(stored: Stored) -> str:
    """The card of a model, as text."""
    config = stored.config
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    averaged = {None: None, True: "ema", False: "raw"}[stored.averaged]
    content = {
        "format_version": FORMAT_VERSION,
        "parts": stored.parts,
        "step": stored.step,
        "weights": averaged,
        "config": config,
    }
    if stored.autoencoder is not None:
        content["autoencoder"] = autoencoder.config_json(stored.autoencoder, config["autoencoder"])
    return json.dumps(content, indent=2, allow_nan=False)


def readme(stored: Stored, usage: str = "") -> str:
    """The model card of an export, in Markdown; `usage` is a section of it."""
    c, averaged = stored.config, {True: "the EMA of the", False: "the raw", None: "the"}
    clip = f"- CLIP text encoder, {c.clip.num_layers} layers\n" if c.dit.pooled_width else ""
    vae = "\n- The VAE has a licence of its own; SD3's is Stability AI's community licence."
    return README.format(
        name=c.name,
        step="an unknown number of" if stored.step is None else f"{stored.step:,}",
        weights=f"{averaged[stored.averaged]} trained weights",
        source=c.memory.source,
        attention=c.dit.attention,
        positions=c.dit.positions + (" and a table" if c.dit.table_size else ""),
        conditioning=c.dit.conditioning,
        dit=f"{c.dit.num_layers} layers of width {c.dit.width}",
        llm=f"{c.llm.num_layers} layers of width {c.llm.width}",
        clip=clip,
        size=c.data.image_size,
        steps=c.sampling.steps,
        guidance=c.sampling.guidance,
        vae=vae if stored.autoencoder is not None else "",
        usage=usage,
    )


README = """---
pipeline_tag: text-to-image
library_name: diffusers
---

# {name}

A text-to-image model: a diffusion transformer fused with a frozen language model ("Exploring the
Deep Fusion of Large Language Models and Diffusion Transformers for Text-to-Image Synthesis",
arXiv 2505.10046), in the form of t2i_jax. These are {weights} after {step} steps.

- {source} source of the text, {attention} attention
- positions: {positions}; conditioning on the time: {conditioning}
- diffusion transformer of {dit}
- language model of {llm}, frozen
{clip}- trained at {size} x {size} pixels; sampled with {steps} steps, guidance {guidance}

The whole config is in t2i_jax.json.
{usage}
## Licences

- The language model's weights are in here. Gemma's are provided under and subject to the Gemma
  Terms of Use (ai.google.dev/gemma/terms), which go with every copy; other models have theirs.{vae}
"""


def rules(shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """One a path: our own names, layer by layer."""
    return [Rule(path, flat_name(path), same_axes(path, shape)) for path, shape in shapes.items()]


def flat_name(path: str) -> str:
    """'dit/blocks/mlp/up/weight' -> 'dit.blocks.{L}.mlp.up.weight'."""
    return ".".join(f"{part}.{{L}}" if part in _LAYERS else part for part in path.split("/"))


def same_axes(path: str, shape: tuple[int, ...]) -> str:
    """The layout of a tensor that has our axes, but for that of the layers."""
    axes = " ".join(_LETTERS[: len(shape) - ("{L}" in flat_name(path))])
    return f"{axes} -> {axes}"


def open_native(path: epath.PathLike) -> Stored:
    """A model, or a part of one. Raises FileNotFoundError or ValueError naming what is wrong."""
    directory = epath.Path(path)
    content = read_card(directory)
    parts, config = content.get("parts"), content["config"]
    if not isinstance(parts, list) or not set(parts) <= set(PARTS):
        raise ValueError(f"{directory / CARD}: parts are {parts!r}; known: {list(PARTS)}.")
    if "dit" in parts:
        config = whole_config(content, directory / CARD)
    net = None
    if "autoencoder" in parts:
        net = autoencoder.network(directory / CARD, content.get("autoencoder"))
    shapes = expected_shapes(config, net, parts)
    tensors = safetensors.open_tensors(find_files(directory))
    there = {name: directory / name for name in (TOKENIZER, CLIP_TOKENIZER)}
    there = {name: path if path.is_dir() else None for name, path in there.items()}
    if "dit" in parts and there[TOKENIZER] is None:
        raise FileNotFoundError(f"{directory} has no folder {TOKENIZER}/.")
    return Stored(
        where=directory,
        layout="t2i_jax weights",
        config=config,
        weights=mapping.sources(directory, tensors, shapes, rules(shapes)),
        autoencoder=net,
        **there,
        **provenance(content),
    )


def provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a card, or an empty one, says of where the weights come from."""
    averaged = {"ema": True, "raw": False}.get(content.get("weights"))
    return {"step": content.get("step"), "averaged": averaged}


def point_here(config: ConfigDict) -> None:
    """Sets the paths of a config's weights to what they are beside its card."""
    identity, pooled = config.autoencoder.kind == "identity", config.dit.pooled_width
    config.weights.llm, config.weights.tokenizer = ".", TOKENIZER
    config.weights.autoencoder = "" if identity else "."
    config.weights.clip = "." if pooled else ""
    config.weights.start = ""


def whole_config(content: Mapping[str, Any], file: Any) -> ConfigDict:
    """The config of a card. Raises ValueError where it is not one of this version."""
    config = configs.from_json(json.dumps(content["config"]))
    try:
        schema = configs.base()
    except ValueError:  # the package alone, without the configs of a checkout
        schema = None
    try:
        configs.validate(config, schema)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def files(stored: Stored) -> Files:
    """The directory of a model, or of a part of one."""
    shapes = {path: stored.weights[path].shape for path in sorted(stored.weights)}
    weights = Weights("", "model", mapping.entries(stored.weights, rules(shapes)))
    return Files([weights], {CARD: card(stored)}, tokenizers(stored))


def tokenizers(stored: Stored) -> dict[str, epath.Path | None]:
    """Where the tokenizers go in a directory of ours, and where they come from."""
    return {TOKENIZER: stored.tokenizer, CLIP_TOKENIZER: stored.clip_tokenizer}
