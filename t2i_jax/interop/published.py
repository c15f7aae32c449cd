"""The published system's pipelines: directories as its `save_pipeline` makes them, both ways.

    model_index.json     FuseDiTPipeline, FuseDiTPipelineWithCLIP or DiTPipeline
    transformer/         config.json and weights; of a FuseDiT with its language model
    llm/                 the language model, of a DiT
    vae/, scheduler/, tokenizer/
    clip/, clip_tokenizer/    where the DiT is conditioned on CLIP

What we write has our card beside model_index.json, from which the whole config comes back; of what
others wrote, the config is the published recipe with what their files say.
"""

import json
import math
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.interop import autoencoder, clip, llm, mapping, native, reference, safetensors
from t2i_jax.interop.directory import find, read_json
from t2i_jax.interop.reference_config import config_json, sections
from t2i_jax.interop.stored import Files, Stored, Weights, prefixed

INDEX = "model_index.json"
_FUSED, _WITH_CLIP, _BASELINE = "FuseDiTPipeline", "FuseDiTPipelineWithCLIP", "DiTPipeline"
FOLDERS = ("transformer", "llm", "vae", "clip", "tokenizer", "clip_tokenizer")
PIPELINES = (_FUSED, _WITH_CLIP, _BASELINE)
VERSION = "0.32.0"  # of diffusers, which the published code was written for
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TOKENIZER = "PreTrainedTokenizerFast"  # reads any tokenizer.json


def open_pipeline(path: epath.PathLike, image_size: int | None = None) -> Stored:
    """A published pipeline. Raises FileNotFoundError or ValueError naming what is wrong.

    `image_size` is that which the model was trained at, which the files do not say; by default the
    published 512, or as much as its table of positions has.
    """
    directory = epath.Path(path)
    kind = read_json(directory / INDEX).get("_class_name")
    transformer, files = find(directory, "transformer")
    theirs = read_json(transformer / "config.json")
    weights = reference.open_transformer(transformer, theirs, safetensors.open_tensors(files))
    if (kind == _BASELINE) == (theirs["model_type"] == "FuseDiT"):
        raise ValueError(f"{directory}: a {kind} with a {theirs['model_type']!r} transformer.")
    found = sections(theirs)
    if kind == _BASELINE:
        weights |= prefixed("llm", llm.open_llm(directory / "llm", found["llm"]))
    net, section, vae = autoencoder.open_autoencoder(directory / "vae")
    weights |= prefixed("autoencoder", vae)
    found["autoencoder"] = section
    if found["dit"]["pooled_width"]:
        encoder, text = clip.open_clip(directory / "clip")
        weights |= prefixed("clip", text)
        found["clip"] = clip.section(encoder)
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    found["flow"] = {
        "shift": float(scheduler.get("shift", 1.0)),
        "num_timesteps": scheduler.get("num_train_timesteps", 1000),
    }
    card = native.read_card(directory) if (directory / native.CARD).is_file() else {}
    config = _config(directory, found, card, image_size)
    return Stored(
        where=directory,
        layout=f"published pipeline ({kind})",
        config=config,
        weights=weights,
        autoencoder=net,
        tokenizer=directory / "tokenizer",
        clip_tokenizer=directory / "clip_tokenizer" if "clip" in found else None,
        **native.provenance(card),
    )


def _config(directory, found: dict[str, Any], card: dict, image_size: int | None) -> ConfigDict:
    """The card's config, or the published recipe with the sections that were found."""
    channels, latents = found.pop("channels"), found["autoencoder"]["channels"]
    if channels != latents:
        raise ValueError(f"{directory}: transformer/ has {channels} channels, vae/ has {latents}.")
    if card:
        config = native.whole_config(card, directory / native.CARD)
        if image_size not in (None, config.data.image_size):
            raise ValueError(
                f"{directory / native.CARD} says that the model was trained at "
                f"{config.data.image_size} pixels, not {image_size}."
            )
        wrong = [
            f"{name}.{key} is {value!r}, in {native.CARD} {config[name][key]!r}"
            for name, section in found.items()
            for key, value in section.items()
            if not _same(config[name][key], value) and (name, key) != ("llm", "query_scalar")
        ]
        if wrong:
            raise ValueError(f"{directory} and its card disagree: {'; '.join(wrong)}.")
        return config
    config = configs.base().unlock()
    config.name = re.sub(r"[^\w.-]", "-", directory.name).lstrip("-.") or "imported"
    for name, section in found.items():
        config[name].update(section)
    cell = config.autoencoder.downsample * config.dit.patch_size
    most = config.dit.table_size * cell or math.inf
    config.data.image_size = image_size or min(config.data.image_size, most)
    config.data.max_text_tokens = min(config.data.max_text_tokens, config.llm.max_tokens)
    native.point_here(config)
    try:
        configs.validate(config, configs.base())
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return config.lock()


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b))


def files(stored: Stored, dtype: str) -> Files:
    """The pipeline of a model. Raises ValueError naming what the published models cannot have."""
    if stored.autoencoder is None:
        raise ValueError("The published pipelines have a VAE; this model draws pixels.")
    config = stored.config
    if config["dit"]["pooled_width"] and not config["clip"]["projection_width"]:
        raise ValueError("The published pipelines have a CLIP with a projection; this has none.")
    theirs = config_json(config) | {"torch_dtype": dtype}
    fused, with_clip = theirs["model_type"] == "FuseDiT", bool(config["dit"]["pooled_width"])
    language = theirs["base_config"] | {"torch_dtype": dtype}
    kind = (_WITH_CLIP if with_clip else _FUSED) if fused else _BASELINE
    inside = sorted(p for p in stored.weights if p.split("/")[0] in ("dit", "memory", "llm"))
    paths = [p for p in inside if fused or not p.startswith("llm/")]
    rules = reference.rules(theirs, paths)
    entries = reference.table_entry(theirs) + mapping.entries(stored.weights, rules)
    weights = [Weights("transformer", "model", entries)]
    index = {
        "_class_name": kind,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", SCHEDULER],
        "tokenizer": ["transformers", TOKENIZER],
        "transformer": ["diffusion.models", theirs["model_type"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    texts = {
        "transformer/config.json": theirs,
        "scheduler/scheduler_config.json": scheduler(config),
    }
    if not fused:
        weights.append(
            Weights("llm", "model", mapping.entries(stored.part("llm"), llm.rules(language)))
        )
        texts["llm/config.json"] = language
        index["llm"] = ["transformers", language["architectures"][0]]
    add_vae(stored, weights, texts)
    if with_clip:
        add_clip(stored, "clip", weights, texts)
        index["clip"] = ["transformers", "CLIPTextModelWithProjection"]
        index["clip_tokenizer"] = ["transformers", TOKENIZER]
    texts[INDEX] = dict(sorted(index.items()))
    texts = {name: json.dumps(content, indent=2) for name, content in texts.items()}
    texts |= {native.CARD: native.card(stored), "README.md": native.readme(stored)}
    return Files(weights, texts, native.tokenizers(stored))


def scheduler(config: Any) -> dict[str, Any]:
    """scheduler_config.json of a config's flow."""
    flow = config["flow"]
    kept = {"num_train_timesteps": flow["num_timesteps"], "shift": flow["shift"]}
    return {"_class_name": SCHEDULER, "_diffusers_version": VERSION} | kept


def add_vae(stored: Stored, weights: list[Weights], texts: dict[str, Any]) -> None:
    """The folder vae/, as diffusers has it."""
    found = stored.part("autoencoder")
    shapes = {path: source.shape for path, source in found.items()}
    entries = mapping.entries(found, autoencoder.rules(shapes))
    weights.append(Weights("vae", "diffusion_pytorch_model", entries))
    texts["vae/config.json"] = autoencoder.config_json(
        stored.autoencoder, stored.config["autoencoder"]
    )


def add_clip(stored: Stored, folder: str, weights: list[Weights], texts: dict[str, Any]) -> None:
    """The folder of the CLIP text encoder, as transformers has it."""
    weights.append(
        Weights(
            folder, "model", mapping.entries(stored.part("clip"), clip.rules(stored.config["clip"]))
        )
    )
    texts[f"{folder}/config.json"] = clip.config_json(stored.config["clip"])
