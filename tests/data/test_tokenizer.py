"""Token ids, padding and BOS, for tokenizers of our own and files of others."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from t2i_jax.data.tokenizer import Tokenizer

CAPTIONS = [f"a {c} {s} above the {d} cross" for c in ("red", "blue", "green")
            for s in ("circle", "square") for d in ("white", "purple")]  # fmt: skip
TEXTS = ["a red circle", "", "🦊 éß 日本", "unseen Words, 42!", "two  spaces\nand a line"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 300)


def test_special_tokens_are_gemmas(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id) == (0, 2)
    assert tokenizer._backend.token_to_id("<eos>") == 1
    assert tokenizer._backend.token_to_id("<unk>") == 3
    assert 260 < tokenizer.vocab_size <= 300


def test_any_text_comes_back(tokenizer):
    ids, mask = tokenizer.encode(TEXTS, 64)
    assert [tokenizer.decode(row) for row in ids] == TEXTS
    assert not (ids == 3).any()  # no unknowns
    assert mask.any(1).all()


def test_layout(tokenizer):
    ids, mask = tokenizer.encode(TEXTS, 24)
    assert ids.shape == mask.shape == (5, 24) and ids.dtype == np.int32 and mask.dtype == bool
    assert (ids[:, 0] == 2).all() and not (ids[:, 1:] == 2).any()
    np.testing.assert_array_equal(ids != 0, mask)
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # tokens, then padding
    assert mask[1].sum() == 1 and ids[1].tolist() == [2] + [0] * 23  # '' is BOS alone


def test_truncation_keeps_the_beginning(tokenizer):
    long, _ = tokenizer.encode(CAPTIONS, 40)
    short, mask = tokenizer.encode(CAPTIONS, 4)
    np.testing.assert_array_equal(short, long[:, :4])
    assert mask.all()
    assert tokenizer.encode(CAPTIONS, 1)[0].tolist() == [[2]] * len(CAPTIONS)


def test_words_are_the_same_tokens_at_the_start_as_in_the_middle(tokenizer):
    (alone, after), _ = tokenizer.encode(["circle", "red circle"], 8)
    red = tokenizer.encode(["red"], 8)[1].sum() - 1
    assert after[1 + red] == alone[1]


def test_training_is_deterministic_across_processes(tokenizer):
    script = (
        "import sys, json; from t2i_jax.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), 300)._backend.to_str())"
    )
    command = [sys.executable, "-c", script, json.dumps(CAPTIONS)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == json.loads(tokenizer._backend.to_str())


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(ValueError, match=r"pretrain\.vocab_size=259.*260"):
        Tokenizer.train(CAPTIONS, 259)


def test_save_and_load(tokenizer, tmp_path):
    directory = tmp_path / "run" / "tokenizer"
    for _ in range(2):  # the second time over the first
        tokenizer.save(directory)
        loaded = Tokenizer.load(directory)
        for before, after in zip(
            tokenizer.encode(TEXTS, 32), loaded.encode(TEXTS, 32), strict=True
        ):
            np.testing.assert_array_equal(before, after)
    assert [p.name for p in directory.parent.iterdir()] == ["tokenizer"]  # nothing temporary
    assert loaded.vocab_size == tokenizer.vocab_size


def test_transformers_reads_what_we_save(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 2, 1)
    for text, row, real in zip(TEXTS, *tokenizer.encode(TEXTS, 64), strict=True):
        assert theirs(text)["input_ids"] == row[real].tolist()
    padded = theirs(TEXTS, padding="max_length", max_length=64)["input_ids"]
    assert padded == tokenizer.encode(TEXTS, 64)[0].tolist()


def _word_level(directory, config, **parts):
    """A tokenizer.json as a stranger might write it: words 4 to 6, Gemma's special tokens."""
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "a", "red", "fox"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.enable_padding(direction="left", length=9, pad_id=1, pad_token="<eos>")
    backend.enable_truncation(2, direction="left")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str())
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


BOS_AND_EOS = tokenizers.processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
)


@pytest.mark.parametrize("parts", [{}, {"post_processor": BOS_AND_EOS}])
@pytest.mark.parametrize("config", [
    None,
    {"bos_token": "<bos>", "pad_token": "<pad>", "padding_side": "left"},
    {"bos_token": {"content": "<bos>"}, "pad_token": {"content": "<pad>"}, "add_bos_token": False},
])  # fmt: skip
def test_strange_files_are_forced_right_with_one_bos(tmp_path, parts, config):
    tokenizer = _word_level(tmp_path, config, **parts)
    ids, mask = tokenizer.encode(["a red fox", "fox", "<bos> a fox"], 6)
    assert ids.tolist() == [[2, 4, 5, 6, 0, 0], [2, 6, 0, 0, 0, 0], [2, 4, 6, 0, 0, 0]]
    assert mask.sum(1).tolist() == [4, 2, 3]
    assert tokenizer.vocab_size == 7


def test_the_config_says_which_tokens_are_special(tmp_path):
    tokenizer = _word_level(tmp_path, {"bos_token": "fox", "pad_token": "red"})
    assert tokenizer.encode(["a"], 3)[0].tolist() == [[6, 4, 5]]


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ValueError, match="no bos_token"):
        Tokenizer.load(tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.load(tmp_path / "gemma-2b")
    assert f"hf download google/gemma-2b --local-dir {tmp_path / 'gemma-2b'}" in str(error.value)
    (tmp_path / "tokenizer.model").write_bytes(b"\x80")  # sentencepiece: never read
    with pytest.raises(FileNotFoundError, match=r"it holds \['tokenizer.model'\]"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
