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
