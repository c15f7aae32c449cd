"""Language models as transformers saves them, read here, against transformers itself, in float32.

The models are small and random, norms included; both sides read the same directory.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from t2i_jax.interop.llm import load_llm, section
from t2i_jax.models.llm import LLM

LENGTHS = (11, 7, 1)  # of the prompts; right-padded
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
GEMMA2 = SIZES | {
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 16,
}
# What the published file of PaliGemma says nothing of, and so has transformers' defaults.
UNSAID = ("head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings")
PALIGEMMA = {name: value for name, value in SIZES.items() if name not in UNSAID}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PUBLISHED, RENAMED = "language_model.model.", "model.language_model."


def gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES))


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GEMMA2))


def qwen3():
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(tie_word_embeddings=True, **SIZES)
    )


def paligemma(text="gemma"):
    sizes = {"gemma": PALIGEMMA, "gemma2": GEMMA2}[text]
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": text} | sizes,
        vision_config=VISION,
        hidden_size=24,
        projection_dim=24,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def save(model, path):
    """Random weights, nothing zero, in several files; returns what transformers reads of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            if "norm" in name:
                x += 0.3 * noise
            else:
                x.copy_(1.5 * noise / x.shape[-1] ** 0.5)
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return reread(type(model), path)


def reread(kind, path):
    return kind.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def tower(model):
    """The part that is a language model without a head."""
    base = model.base_model
    return getattr(base, "language_model", base)


def prompts():
    ids = np.random.default_rng(1).integers(1, 97, (len(LENGTHS), max(LENGTHS)))
    return ids, np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


def torchs(model):
    """(keys before rotation, values, final hidden state, logits) of the prompts."""
    base, kept = tower(model), {"keys": [], "values": []}
    base.config.use_bidirectional_attention = False  # PaliGemma's prompt, which here is text alone
    hooks = []
    for layer in base.layers:
        attention = layer.self_attn
        parts = {
            "keys": getattr(attention, "k_norm", attention.k_proj),
            "values": attention.v_proj,
        }
        for name, part in parts.items():
            keep = lambda module, inputs, output, name=name: kept[name].append(output)  # noqa: E731
            hooks.append(part.register_forward_hook(keep))
    ids, mask = prompts()
    with torch.no_grad():
        out = base(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(1 * mask))
        logits = model.lm_head(out.last_hidden_state)
        cap = getattr(base.config, "final_logit_softcapping", None)
        logits = cap * torch.tanh(logits / cap) if cap else logits
    for hook in hooks:
        hook.remove()
    config = base.config
    heads = (*ids.shape, config.num_key_value_heads, config.head_dim)
    keys, values = (torch.stack([x.reshape(heads) for x in kept[n]]) for n in ("keys", "values"))
    return [x.numpy() for x in (keys, values, out.last_hidden_state, logits)]


def ours(path, **changes):
    """The same of the network and parameters that the directory describes, fields changed."""
    fields = section(json.loads((path / "config.json").read_text())) | changes
    num_plain = fields.pop("num_plain", 0)
    params = load_llm(path, fields, dtype="float32")
    net = LLM(**fields, num_plain=num_plain)
    ids, mask = prompts()
    features = jax.jit(net.apply)({"params": params}, ids, mask)
    logits = net.apply({"params": params}, ids, mask, method="logits")
    return features.keys_LBTKH, features.values_LBTKH, features.hidden_BTD, logits


def errors(actual, expected):
    """Relative distances of the real tokens: of the keys, values, hidden states and logits."""
    _, mask = prompts()
    out = []
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        rows = (slice(None), mask) if a.ndim == 5 else mask
        a, b = np.float64(a)[rows], np.float64(b)[rows]
        out.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return out


def check(actual, expected):
    found = errors(actual, expected)
    print("keys, values, hidden, logits:", *(f"{e:.1e}" for e in found))
    assert max(found) < 1e-5, found


@pytest.mark.parametrize("make", [gemma, gemma2, qwen3, paligemma])
def test_a_family_is_transformers(tmp_path, make):
    model = save(make(), tmp_path)
    check(ours(tmp_path), torchs(model))


def test_the_language_half_of_paligemma_2(tmp_path):
    model = save(paligemma("gemma2"), tmp_path)
    check(ours(tmp_path), torchs(model))


def test_paligemma_under_its_other_names_and_with_a_short_config(tmp_path):
    """Some versions of transformers save these names; the published config.json is this short."""
    expected = torchs(save(paligemma(), tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        tensors = {}
        for name, x in load_file(file).items():
            tensors[name.replace(PUBLISHED, RENAMED) if PUBLISHED in name else f"model.{name}"] = x
        save_file(tensors, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(PUBLISHED, RENAMED))
    config = json.loads((tmp_path / "config.json").read_text())
    for name in UNSAID:
        del config["text_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(ours(tmp_path), expected)


def test_a_model_without_a_head(tmp_path):
    whole = save(gemma2(), tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "base")
    check(ours(tmp_path / "base"), torchs(whole))


def test_caps_and_scale_matter_here(tmp_path):
    """The agreement above is not one of scores too small for the cap."""
    expected = torchs(save(gemma2(), tmp_path))
    fields = LLM(**section(json.loads((tmp_path / "config.json").read_text())))
    assert (fields.softcap, fields.logit_softcap, fields.query_scalar) == (4.0, 3.0, 5.0)
    for num_plain in (1, 3):
        keys, values, hidden, logits = errors(ours(tmp_path, num_plain=num_plain), expected)
        assert hidden > 1e-2 and logits > 1e-3
        assert (keys > 1e-2) == (values > 1e-2) == (num_plain == 3)  # the last layer's keep theirs


@pytest.mark.parametrize("num_plain", [1, 2, 3])
def test_plain_layers_are_torchs_without_cap_and_scale(tmp_path, num_plain):
    model = save(gemma2(), tmp_path)
    for layer in tower(model).layers[-num_plain:]:
        layer.self_attn.attn_logit_softcapping = None
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    check(ours(tmp_path, num_plain=num_plain), torchs(model))


def test_the_first_layers_are_those_of_a_shorter_model(tmp_path):
    model = save(gemma2(), tmp_path)
    base = tower(model)
    base.layers, base.config.num_hidden_layers = base.layers[:2], 2
    check(ours(tmp_path, num_layers=2), torchs(model))
