"""Contradictions of language models, memories, CLIP and tiles, by test_config.py's config."""

import pytest

from t2i_jax import config as configs
from tests.test_config import changed, problems

LANGUAGE_MODEL = {"weights__llm": "gemma", "weights__tokenizer": "gemma"}
CONTRADICTIONS = {
    "llm.norm_offset = 0.5 must be 1 or 0": {"llm__norm_offset": 0.5},
    "llm.softcap_shared = True, but llm.softcap = 0.0": {"llm__softcap_shared": True},
    "data.max_text_tokens = 256 is more than llm.max_tokens = 255": {"llm__max_tokens": 255},
    "llm.softcap_shared = True, but memory.source = 'shallow' shares no layer": {
        **{"llm__softcap": 50.0, "llm__softcap_shared": True, "memory__source": "shallow"}
    },
    "dit.positions = 'none' and dit.table_size = 0": {"dit__positions": "none"},
    "memory.first_layer = 2, but memory.source = 'deep'": {"memory__first_layer": 2},
    "memory.source = 'middle' shares the layers from memory.first_layer = 18": {
        "memory__source": "middle",
        "memory__first_layer": 18,
    },
    "autoencoder.tile = 16, but autoencoder.kind = 'identity' (pixels) has 0": {
        "autoencoder__tile": 16
    },
    "dit.pooled_width = 512, but the embedding that CLIP gives has clip.projection_width = 768": {
        "dit__pooled_width": 512
    },
    "weights.clip = '', but dit.pooled_width = 768 needs CLIP": {
        "dit__pooled_width": 768,
        "weights__clip": "",
    },
    "clip.width = 768 is not divisible by clip.num_heads = 7": {
        "dit__pooled_width": 768,
        "clip__num_heads": 7,
    },
    "data.chat_template = True, but weights.tokenizer = '' makes one that has none": {
        "data__chat_template": True
    },
    "weights.start = '', but lora.rank = 4 trains factors of a model that is there": {
        **LANGUAGE_MODEL,
        "lora__rank": 4,
    },
    "optimizer.name = 'muon' is for whole matrices, not for the factors of lora.rank = 4": {
        **LANGUAGE_MODEL,
        "lora__rank": 4,
        "weights__start": "run",
        "optimizer__name": "muon",
    },
    "weights.llm = '', but lora.rank = 4 needs the language model that its base was": {
        "lora__rank": 4,
        "weights__start": "run",
        "weights__llm": "",
        "pretrain__steps": 1,
    },
    "lora.products = 'heads' is unknown; known: ['all', 'attention', 'mlp']": {
        "lora__products": "heads"
    },
    "checkpoint.keep_every = 7500 is no multiple of checkpoint.every = 5000": {
        "checkpoint__keep_every": 7500
    },
    "profile.start = 10 + profile.steps = 5 is more than train.steps = 14": {
        **{"profile__steps": 5, "train__steps": 14}
    },
    "data.text_buckets = (64, 257) must be lengths from 2 to data.max_text_tokens = 256": {
        "data__text_buckets": (64, 257)
    },
    "data.text_buckets = (1,) must be lengths from 2 to": {"data__text_buckets": (1,)},
    "data.text_buckets = (64.0,) must be lengths from 2 to": {"data__text_buckets": (64.0,)},
    "data.add_generation_prompt = True, but data.chat_template = False": {
        "data__add_generation_prompt": True
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_contradiction_is_named(message):
    (problem,) = problems(changed(**CONTRADICTIONS[message]))
    assert problem.startswith(message)


def test_clip_is_looked_at_only_where_it_is_used():
    unused = changed(weights__clip="", clip__num_heads=7, clip__projection_width=5)
    configs.validate(unused, configs.base())


def test_a_shared_soft_cap_is_no_contradiction():
    configs.validate(changed(llm__softcap=50.0, llm__softcap_shared=True), configs.base())


def test_texts_may_be_cut_to_any_length_that_a_text_can_have():
    configs.validate(changed(data__text_buckets=(2, 64, 256)), configs.base())
