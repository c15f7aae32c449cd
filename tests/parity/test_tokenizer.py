"""Tokenizers in the format of Gemma's and Qwen3's, against transformers' own calls."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from t2i_jax.data.tokenizer import Tokenizer

TEXTS = ["red a red", "", "é🦊 red\n\nred", " red ", "user <x> model"]
MERGES = [("r", "e"), ("re", "d"), ("u", "s"), ("e", "r"), ("us", "er")]
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder, backend, model_type, special, **config):
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    added = {
        str(backend.token_to_id(token)): {"content": token, "special": True, "normalized": False}
        for token in special
    }
    backend.save(str(folder / "tokenizer.json"))
    config = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def gemma(folder):
    """Spaces as '▁', bytes where a letter is not known, BOS and no EOS."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = [*"▁aredsoumlx<>\n", *map("".join, MERGES), "▁red"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [*MERGES, ("▁", "red")]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(bpe)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    replace = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    names = {f"{token[1:-1]}_token": token for token in special[:4]}
    names |= {"add_bos_token": True, "add_eos_token": False, "chat_template": GEMMA_TEMPLATE}
    write(folder, backend, "gemma", special, tokenizer_class="GemmaTokenizer", **names)


def qwen(folder):
    """Byte-level, neither BOS nor EOS."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), "Ġred"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[*MERGES, ("Ġ", "red")]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    names |= {"add_bos_token": False, "unk_token": None, "chat_template": QWEN_TEMPLATE}
    write(folder, backend, "qwen3", special, tokenizer_class="Qwen2Tokenizer", **names)


@pytest.mark.parametrize("make", [gemma, qwen])
def test_tokenizer(tmp_path, make):
    make(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id is None) == (make is qwen)
    for length in (6, 24):
        ids, mask = ours.encode(TEXTS, length)
        expected = theirs(
            TEXTS, padding="max_length", truncation=True, max_length=length, padding_side="right"
        )
        assert ids.tolist() == expected["input_ids"]
        real = np.array(expected["attention_mask"], bool)
        real[:, 0] = True  # no row is empty
        np.testing.assert_array_equal(mask, real)
    for generation in (False, True):
        rows = ours.chat_rows(TEXTS, add_generation_prompt=generation)
        for text, row in zip(TEXTS, rows, strict=True):
            turn = [{"role": "user", "content": text}]
            options = {"add_generation_prompt": generation, "return_dict": False}
            assert row == theirs.apply_chat_template(turn, **options)


def test_a_sentencepiece_model_alone(tmp_path):
    """As the published pipelines have it, of Gemma's kind; the library itself is the oracle."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["a red ring above a blue square", "two small rings by a green triangle", "12 crosses"]
    (tmp_path / "text").write_text("\n".join(words * 50))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    special = {f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    ids = {f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
        **special,
        **ids,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    oracle = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    texts = ["a red ring", "", "two  small é🦊 rings 12", " <eos> a\nb"]
    expected = [[2, *oracle.encode(text)] for text in texts]
    for read in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        assert (read.bos_id, read.pad_id) == (2, 0)
        assert read.rows(texts) == expected
