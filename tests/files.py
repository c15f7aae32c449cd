"""Directories of tokenizers and of CLIP as strangers write them, small."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from t2i_jax.data.tokenizer import Tokenizer

TEMPLATE = (  # Gemma's, in short
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
START, END = "<|startoftext|>", "<|endoftext|>"

# A CLIP text encoder of another size along every axis, in our names and in theirs.
CLIP = {
    "vocab_size": 40,
    "width": 24,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_width": 32,
    "max_tokens": 9,
    "projection_width": 10,
    "activation": "quick_gelu",
    "eos_id": 2,
    "norm_eps": 1e-3,
}
THEIRS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings projection_dim hidden_act eos_token_id layer_norm_eps"
)
CLIP_JSON = dict(zip(THEIRS.split(), CLIP.values(), strict=True)) | {
    "model_type": "clip_text_model"
}


def clip_vocabulary() -> dict[str, int]:
    """Bytes, bytes that end a word, 'red' and 'cat', and the special tokens, START the first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES), START, END]
    return {word: i for i, word in enumerate(words)}


def write_clip(directory, **changes):
    """A CLIP tokenizer as SD3's tokenizer/ is: vocab.json and merges.txt, no tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    both = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    tokens = {
        "bos_token": {"content": START, **both},
        "eos_token": {"content": END, **both},
        "pad_token": END,
        "unk_token": {"content": END, **both},
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
    ids = clip_vocabulary()
    added = {str(ids[token]): {"content": token, "special": True, **both} for token in (START, END)}
    config = {role: END for role in ("eos_token", "pad_token", "unk_token")}
    config |= {"added_tokens_decoder": added, "bos_token": START, "model_max_length": 77}
    config |= {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return directory


def write_chat(directory, captions):
    """One trained on `captions`, with a chat template and its tokens."""
    tokenizer = Tokenizer.train(captions, 300)
    tokenizer.save(directory)
    file = directory / "tokenizer_config.json"
    turns = ("<start_of_turn>", "<end_of_turn>")
    added = {str(tokenizer.vocab_size + i): token for i, token in enumerate(turns)}
    added = {i: {"content": token, "special": True} for i, token in added.items()}
    changes = {"chat_template": TEMPLATE, "added_tokens_decoder": added}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def write_without_bos(directory, captions):
    """One trained on `captions` that, like Qwen's, names no BOS and adds nothing to a text."""
    Tokenizer.train(captions, 300).save(directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    config = {"bos_token": None, "eos_token": "<eos>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def clip_tensors(vocab_size=40, max_tokens=9):
    """Random weights of `CLIP`, by their names."""
    shapes = {
        "embeddings.token_embedding.weight": (vocab_size, 24),
        "embeddings.position_embedding.weight": (max_tokens, 24),
    }

    def linear(name, i, o):
        shapes.update({f"{name}.weight": (o, i), f"{name}.bias": (o,)})

    for layer in (f"encoder.layers.{i}" for i in range(3)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{name}", 24, 24)
        linear(f"{layer}.mlp.fc1", 24, 32), linear(f"{layer}.mlp.fc2", 32, 24)
        for name in ("layer_norm1", "layer_norm2"):
            shapes.update({f"{layer}.{name}.weight": (24,), f"{layer}.{name}.bias": (24,)})
    shapes |= {"final_layer_norm.weight": (24,), "final_layer_norm.bias": (24,)}
    shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    shapes["text_projection.weight"] = (10, 24)
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s, scale=0.4).astype("f4") for n, s in shapes.items()}


def write_clip_weights(folder, config=CLIP_JSON, tensors=None):
    """A directory as transformers' CLIPTextModelWithProjection saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    sizes = config["vocab_size"], config["max_position_embeddings"]
    save_file(tensors or clip_tensors(*sizes), folder / "model.safetensors")
    return folder


VISION_JSON = {  # of an image encoder beside it; again no two sizes are equal
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 28,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
PICTURES_JSON = {  # as OpenAI's first files have them
    "crop_size": 12,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 12,
}


def clip_model_tensors(vocab_size):
    """Random weights of both encoders, and what is beside them, by their names."""
    shapes = {
        "embeddings.class_embedding": (20,),
        "embeddings.patch_embedding.weight": (20, 3, 4, 4),
        "embeddings.position_embedding.weight": (10, 20),
    }
    for layer in (f"encoder.layers.{i}" for i in range(2)):
        products = {f"self_attn.{n}_proj": (20, 20) for n in ("q", "k", "v", "out")}
        products |= {"mlp.fc1": (28, 20), "mlp.fc2": (20, 28)}
        products |= {"layer_norm1": (20,), "layer_norm2": (20,)}
        for name, shape in products.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (20,), f"{name}.bias": (20,)}
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    shapes |= {"visual_projection.weight": (10, 20), "logit_scale": ()}
    rng = np.random.default_rng(1)
    vision = {n: np.asarray(rng.normal(size=s, scale=0.4), "f4") for n, s in shapes.items()}
    vision["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    return clip_tensors(vocab_size) | vision


def write_clip_model(folder, config=None, pictures=PICTURES_JSON, tensors=None):
    """A directory of both encoders, of how pictures are made and of a tokenizer: a CLIPModel."""
    write_clip(folder)
    vocab_size = len(clip_vocabulary())
    text = CLIP_JSON | {"vocab_size": vocab_size}
    both = {"model_type": "clip", "projection_dim": 10}
    both |= {"text_config": text, "vision_config": VISION_JSON} | (config or {})
    (folder / "config.json").write_text(json.dumps(both))
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    save_file(tensors or clip_model_tensors(vocab_size), folder / "model.safetensors")
    return folder
