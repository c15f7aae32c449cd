"""Every published and further configuration, small, as a model on disk."""

import dataclasses
import json
import pathlib

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from t2i_jax import config as configs
from t2i_jax.interop import native
from t2i_jax.interop.stored import Stored, expected_shapes
from t2i_jax.models.autoencoder import AutoencoderKL
from tests import files

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
STUDY = sorted(f"ablations/{f.stem}" for f in (FOLDER / "ablations").glob("*.py"))
NAMES = [*STUDY, "fusion_2b", "fusion_2b_gemma2", "fusion_qwen3"]
OURS = ("ablations/middle", "ablations/mixture", "fusion_qwen3")  # the published system lacks these
# Those that differ from another in sizes alone, or in whose weights they take.
_ALIKE = "gemma_it hidden_1536 hidden_1792 layers_14 paligemma"
_SAME = {"fusion_2b", *(f"ablations/{name}" for name in _ALIKE.split())}
STRUCTURES = [name for name in NAMES if name not in _SAME]
PUBLISHED = [name for name in NAMES if name not in OURS]
VAE = AutoencoderKL(
    latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4
)
WORDS = ["a", "red", "blue", "green", "ring", "square", "above", "below", "two", "small"]
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def config(name, **changes):
    """The config of this name with small sizes, its choices as they are.

    `changes` by key, '.' written '__'.
    """
    c = configs.load(str(FOLDER / f"{name}.py")).unlock()
    extra = c.llm.num_layers - c.dit.num_layers
    wide = c.dit.width == c.llm.width
    c.llm.update(vocab_size=64, width=32, num_layers=3 + (extra > 0), mlp_width=48)
    c.llm.update(num_heads=4, num_kv_heads=min(c.llm.num_kv_heads, 2), head_width=16)
    if c.llm.softcap:  # so strong that it shows where they are used, and where not
        c.llm.update(query_scalar=4.0, softcap=0.5)
    c.dit.update(width=32 if wide else 24, num_layers=3, mlp_width=48)
    if c.memory.source == "middle":
        c.memory.first_layer = 1
        c.llm.num_layers = 2
    if c.dit.table_size:
        c.dit.update(table_size=16, table_range=4.0)
    if c.dit.pooled_width:
        c.clip.update(files.CLIP | {"vocab_size": len(files.clip_vocabulary()), "max_tokens": 77})
        c.dit.pooled_width = c.clip.projection_width
    c.autoencoder.update(channels=4)
    c.data.update(image_size=64, max_text_tokens=8)
    c.train.update(dtype="float32", frozen_dtype="float32")
    c.sampling.update(steps=4, guidance=3.0, prompts=("a red ring",))
    native.point_here(c)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    configs.validate(c, configs.base())
    return c.lock()


@dataclasses.dataclass(frozen=True)
class Memory:
    """A parameter that is in memory."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self, layer=None):
        return self.array if layer is None else self.array[layer]


def weights(config, seed=0):
    """Random parameters of all parts, none of them zero, about as large as trained ones."""
    parts = ("dit", "autoencoder", *(("clip",) if config.dit.pooled_width else ()))
    rng = np.random.default_rng(seed)
    factors = ("autoencoder", "clip") + (() if config.llm.norm_offset else ("llm",))

    def one(path, shape):
        x = rng.standard_normal(shape, np.float32)
        *above, leaf = path.split("/")
        if leaf == "bias" or "norm" in above[-1]:
            centre = leaf == "weight" and above[0] in factors  # a norm's weight is its factor
            return Memory(0.1 * x + np.float32(centre))
        inputs = np.prod(shape[:-1]) if above[0] == "autoencoder" else 32
        return Memory(x * np.float32(0.8 / inputs**0.5))

    return {p: one(p, s) for p, s in expected_shapes(config, VAE, parts).items()}


def model(name, folder, seed=0, **changes):
    """A whole model of `config(name, **changes)`; its tokenizers are written to `folder`."""
    c = config(name, **changes)
    write_tokenizer(folder / "tokenizer", bos=name != "fusion_qwen3")
    clip = folder / "clip_tokenizer" if c.dit.pooled_width else None
    if clip:
        files.write_clip(clip)
    return Stored(
        where=folder,
        layout="toy",
        config=c,
        weights=weights(c, seed),
        autoencoder=VAE,
        tokenizer=folder / "tokenizer",
        clip_tokenizer=clip,
        step=7,
        averaged=True,
    )


def write_tokenizer(folder, bos=True):
    """Words to ids, in the files of a tokenizer of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    backend.save(str(folder / "tokenizer.json"))
    roles = ("pad_token", "eos_token", "bos_token", "unk_token")
    named = dict(zip(roles, SPECIAL, strict=True)) | ({} if bos else {"bos_token": None})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
