"""Token ids, padding and BOS, for tokenizers of our own and files of others."""

from concurrent.futures import ThreadPoolExecutor
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, CLIPTokenizer

from t2i_jax.data.tokenizer import Tokenizer
from tests import files

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
    with pytest.raises(ValueError, match="length=0; BOS and EOS alone take 1"):
        tokenizer.encode(CAPTIONS, 0)


def test_special_tokens_in_a_caption_are_text(tokenizer):
    text = "a <bos> red<eos> <pad>circle"
    ids, mask = tokenizer.encode([text], 64)
    assert (ids[0, 1 : mask.sum()] >= 4).all() and ids[0, 0] == 2
    assert tokenizer.decode(ids[0]) == text


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
    tokenizer.save(tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
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
NAMES = {"bos_token": "<bos>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    "config, parts, before, after, pad",
    [
        (NAMES | {"padding_side": "left", "truncation_side": "left"}, {}, [2], [], 0),
        (NAMES | {"add_bos_token": False}, {}, [2], [], 0),  # one that is named is there
        (NAMES | {"add_bos_token": True, "add_eos_token": False}, {}, [2], [], 0),  # Gemma's
        (NAMES, {"post_processor": BOS_AND_EOS}, [2], [1], 0),
        (None, {"post_processor": BOS_AND_EOS}, [2], [1], 1),
        ({"bos_token": None, "eos_token": "<eos>"}, {}, [], [], 1),  # Qwen's
    ],
)
def test_what_is_around_a_text_is_the_files_to_say_and_padding_is_right(
    tmp_path, config, parts, before, after, pad
):
    tokenizer = _word_level(tmp_path, config, **parts)
    assert tokenizer.pad_id == pad and tokenizer.vocab_size == 7
    ids, mask = tokenizer.encode(["a red fox", "fox", "a fox red red fox a"], 6)
    room = 6 - len(before) - len(after)
    texts = [[4, 5, 6], [6], [4, 6, 5, 5, 6, 4][:room]]
    rows = [[*before, *text, *after] for text in texts]
    assert ids.tolist() == [row + [pad] * (6 - len(row)) for row in rows]
    assert mask.sum(1).tolist() == [len(row) for row in rows]


def test_no_row_is_empty_where_a_model_has_no_bos(tmp_path):
    """Its null prompt is one padding token that counts as real."""
    tokenizer = _word_level(tmp_path, {"eos_token": "<eos>", "pad_token": "<pad>"})
    assert tokenizer.bos_id is None
    ids, mask = tokenizer.encode(["", "fox"], 3)
    assert ids.tolist() == [[0, 0, 0], [6, 0, 0]]
    assert mask.tolist() == [[True, False, False]] * 2


def test_the_config_says_which_tokens_are_special(tmp_path):
    tokenizer = _word_level(tmp_path, {"bos_token": "fox", "pad_token": "red"})
    assert tokenizer.encode(["a"], 3)[0].tolist() == [[6, 4, 5]]


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ValueError, match="names no pad_token, eos_token or bos_token"):
        Tokenizer.load(tmp_path)


def test_clip_from_vocabulary_and_merges(tmp_path):
    """As transformers pads and cuts it, but for special tokens that a caption spells out."""
    files.write_clip(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = files.clip_vocabulary()
    start, end = ids[files.START], ids[files.END]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (start, end, end + 1)
    texts = ["A red  Cat!", "", "red " * 100, "été 🦊 cat's 42"]
    found, mask = tokenizer.encode(texts, 77)
    sentence = [start, ids["a</w>"], ids["red</w>"], ids["cat</w>"], ids["!</w>"], end]
    assert found[0].tolist() == sentence + [end] * 71 and mask[0].sum() == 6
    assert found[1].tolist() == [start] + [end] * 76 and mask[1].sum() == 2
    assert found[2].tolist() == [start] + [ids["red</w>"]] * 75 + [end] and mask[2].all()
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(
        texts, padding="max_length", truncation=True, max_length=77
    )
    assert found.tolist() == theirs["input_ids"]
    assert mask.astype(int).tolist() == theirs["attention_mask"]
    control = tokenizer.encode([f"red {files.END} cat"], 77)[0][0].tolist()
    assert control.index(end) > control.index(ids["cat</w>"])


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return files.write_chat(tmp_path_factory.mktemp("files") / "chat", CAPTIONS)


@pytest.mark.parametrize("generation", [False, True])
def test_chats_are_as_transformers_writes_them(chat, generation):
    tokenizer, theirs = Tokenizer.load(chat), AutoTokenizer.from_pretrained(chat)
    options = {"add_generation_prompt": generation}
    rows = tokenizer.chat_rows(TEXTS, **options)
    for text, row in zip(TEXTS, rows, strict=True):
        turn = [{"role": "user", "content": text}]
        assert row == theirs.apply_chat_template(turn, **options)["input_ids"]
        assert row[0] == 2 and row.count(2) == 1
    assert tokenizer.chat_rows(TEXTS, 5, **options) == [row[:5] for row in rows]
    opened = "<start_of_turn>user\na red circle<end_of_turn>\n"
    opened += "<start_of_turn>model\n" if generation else ""
    assert theirs.decode(rows[0][1:]).replace(" ", "") == opened.replace(" ", "")


def test_control_tokens_in_a_caption_are_text_in_a_chat_too(chat):
    tokenizer = Tokenizer.load(chat)
    (row,) = tokenizer.chat_rows(["red<end_of_turn> <bos>"], add_generation_prompt=False)
    turns = [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    assert [i for i in row if i in (2, *turns)] == [2, *turns]  # the template's
    assert "red<end_of_turn>" in tokenizer.decode(row)


def test_a_tokenizer_without_a_template_has_no_chats(tokenizer):
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat_rows(["red"], add_generation_prompt=False)


def test_threads_share_one(chat):
    tokenizer = Tokenizer.load(chat)
    many = [f"{text} {i}" for i in range(20) for text in TEXTS]
    options = {"add_generation_prompt": True}
    expected = [(tokenizer.rows([t], 9), tokenizer.chat_rows([t], **options)) for t in many]
    fresh = Tokenizer.load(chat)
    with ThreadPoolExecutor(8) as pool:
        both = pool.map(lambda t: (fresh.rows([t], 9), fresh.chat_rows([t], **options)), many)
        assert list(both) == expected


def test_no_code_of_a_directory_is_run_and_no_network_used(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Tokenizer.load(files.write_clip(tmp_path / "clip")).bos_id is not None
    remote = {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "tokenizer_class": "T"}
    files.write_clip(tmp_path / "remote", **remote)
    (tmp_path / "remote" / "code.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"vocab\.json cannot be read.*custom code"):
        Tokenizer.load(tmp_path / "remote")


def test_missing_and_broken_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.load(tmp_path / "gemma-2b")
    assert f"hf download google/gemma-2b --local-dir {tmp_path / 'gemma-2b'}" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"Fetch it with `ask me` \(accept its lic.*\)\.$"):
        Tokenizer.load(tmp_path / "gemma-2b", "ask me")
    (tmp_path / "vocab.json").write_text("{}")  # half of a tokenizer
    with pytest.raises(FileNotFoundError, match=r"it holds \['vocab.json'\]"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x80")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="a sentencepiece model alone: `pip install sent"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
