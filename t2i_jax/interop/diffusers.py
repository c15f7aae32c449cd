"""Pipelines for current diffusers that bring their code, both ways.

    model_index.json, fused_pipeline.py
    transformer/       config.json, weights and the code of the model, its language model included
    vae/, scheduler/, tokenizer/
    clip/, clip_tokenizer/    where the DiT is conditioned on CLIP

`DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` loads one with torch, diffusers and
transformers alone. The code is t2i_jax/interop/torch_runtime. Tensors have our names, layer by
layer, and torch's axes.
"""

from collections.abc import Iterable
import json
from pathlib import Path
import re
from typing import Any

from etils import epath

from t2i_jax.interop import autoencoder, clip, mapping, native, published, reference, safetensors
from t2i_jax.interop.directory import find_files, read_json
from t2i_jax.interop.llm import FAMILIES
from t2i_jax.interop.mapping import Rule
from t2i_jax.interop.stored import (
    Files,
    Stored,
    Weights,
    expected_shapes,
    prefixed,
)

CLASS = ["fused_pipeline", "FusedPipeline"]
_TRANSFORMER = ["fused_transformer", "FusedTransformer"]
_STEM = "diffusion_pytorch_model"
_USAGE = """
## Use

```python
from diffusers import DiffusionPipeline  # made for diffusers 0.42 and transformers 5.23

pipe = DiffusionPipeline.from_pretrained("DIR", trust_remote_code=True)
image = pipe("a prompt").images[0]
```
"""
_SECTIONS = ("llm", "memory", "dit")


def rules(paths: Iterable[str]) -> list[Rule]:
    """Where each parameter of the transformer is."""
    layouts = reference.layouts() | {"memory/weight": "L M -> L M"}
    for family in FAMILIES.values():
        layouts |= {f"llm/{rule.ours}": rule.layout for rule in family.rules}
    return [Rule(path, native.flat_name(path), layouts[path]) for path in paths]


def open_pipeline(path: epath.PathLike) -> Stored:
    """A pipeline that `files` made. Raises FileNotFoundError or ValueError naming what is wrong."""
    directory = epath.Path(path)
    card = native.read_card(directory)
    config = native.whole_config(card, directory / native.CARD)
    shapes = expected_shapes(config, None, ["dit"])
    folder = directory / "transformer"
    theirs = read_json(folder / "config.json")
    expected = _transformer_config(config)
    wrong = [name for name, value in expected.items() if theirs.get(name) != value]
    if wrong:
        raise ValueError(f"{folder / 'config.json'} and the card disagree on {', '.join(wrong)}.")
    tensors = safetensors.open_tensors(find_files(folder))
    weights = dict(mapping.sources(folder, tensors, shapes, rules(shapes)))
    net, pooled = None, config.dit.pooled_width
    if config.autoencoder.kind != "identity":
        net, _, found = autoencoder.open_autoencoder(directory / "vae", config.autoencoder)
        weights |= prefixed("autoencoder", found)
    if pooled:
        weights |= prefixed("clip", clip.open_clip(directory / "clip", config.clip)[1])
    return Stored(
        where=directory,
        layout="pipeline for diffusers",
        config=config,
        weights=weights,
        autoencoder=net,
        tokenizer=directory / "tokenizer",
        clip_tokenizer=directory / "clip_tokenizer" if pooled else None,
        **native.provenance(card),
    )


def _transformer_config(config: Any) -> dict[str, Any]:
    """The arguments of the transformer's class."""
    sections = {f"{name}_config": config[name].to_dict() for name in _SECTIONS}
    return sections | {"channels": config.autoencoder.channels}


def files(stored: Stored, dtype: str) -> Files:
    """The pipeline of a model."""
    del dtype  # torch's is given in loading
    config = stored.config
    paths = sorted(p for p in stored.weights if p.split("/")[0] in ("dit", "memory", "llm"))
    weights = [Weights("transformer", _STEM, mapping.entries(stored.weights, rules(paths)))]
    index = {
        "_class_name": CLASS,
        "_diffusers_version": published.VERSION,
        "scheduler": ["diffusers", published.SCHEDULER],
        "tokenizer": ["transformers", published.TOKENIZER],
        "transformer": _TRANSFORMER,
        "vae": [None, None],
        "clip": [None, None],
        "clip_tokenizer": [None, None],
    } | _call_defaults(config)
    name = {"_class_name": _TRANSFORMER[1], "_diffusers_version": published.VERSION}
    texts = {
        "transformer/config.json": name | _transformer_config(config),
        "scheduler/scheduler_config.json": published.scheduler(config),
    }
    if stored.autoencoder is not None:
        published.add_vae(stored, weights, texts)
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if config.dit.pooled_width:
        published.add_clip(stored, "clip", weights, texts)
        index["clip"] = ["transformers", clip.model_class(config.clip)]
        index["clip_tokenizer"] = ["transformers", published.TOKENIZER]
    texts = {name: json.dumps(content, indent=2) for name, content in texts.items()}
    texts[published.INDEX] = json.dumps(index, indent=2)
    texts |= _code()
    texts |= {native.CARD: native.card(stored), "README.md": native.readme(stored, _USAGE)}
    return Files(weights, texts, native.tokenizers(stored))


def _code() -> dict[str, str]:
    """File -> the code that a pipeline brings.

    The layers go into the file of the transformer: diffusers fetches from the Hub no other file of
    a component's than that of its class.
    """
    runtime = Path(__file__).parent / "torch_runtime"
    names = ("fused_pipeline", "fused_transformer", "fused_layers")
    pipeline, transformer, layers = ((runtime / f"{name}.py").read_text() for name in names)
    whole, count = re.subn(
        r"from \.fused_layers import \([^)]*\)\n", lambda _: layers, transformer, count=1
    )
    if count != 1:
        raise AssertionError("fused_transformer.py does not import fused_layers as it should.")
    return {"fused_pipeline.py": pipeline, "transformer/fused_transformer.py": whole}


def _call_defaults(config: Any) -> dict[str, Any]:
    """What the pipeline's class takes beside its models."""
    data = config.data
    return {
        "image_size": data.image_size,
        "max_text_tokens": data.max_text_tokens,
        "max_clip_tokens": config.clip.max_tokens,
        "instruction": data.instruction,
        "chat_template": data.chat_template,
        "add_generation_prompt": data.add_generation_prompt,
        "num_inference_steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance,
    }
