"""Instruction, chat template and lengths: the rows that networks read."""

import numpy as np
import pytest

from configs import base
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from tests import files

CAPTIONS = ["a red ring", "", "draw a blue square"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a chat template, and room for it."""
    directory = tmp_path_factory.mktemp("files") / "chat"
    return Tokenizer.load(files.write_chat(directory, CAPTIONS))


def make(tokenizer, clip=None, **options):
    data = base.get_config().data
    data.update(max_text_tokens=8, **options)
    return Prompts(tokenizer, data, clip)


def test_without_options_it_is_the_tokenizer(tokenizer):
    prompts = make(tokenizer)
    text = prompts.encode(CAPTIONS)
    assert prompts.length == 8 and text.keys() == {"ids", "mask"}
    for made, expected in zip(text.values(), tokenizer.encode(CAPTIONS, 8), strict=True):
        np.testing.assert_array_equal(made, expected)


def test_the_instruction_takes_no_room_from_the_caption(tokenizer):
    """Its tokens, BOS and trailing spaces apart, are added to the length of all rows."""
    prompts = make(tokenizer, instruction="draw: ")
    (alone,) = tokenizer.rows(["draw:"])
    assert prompts.length == 8 + len(alone) - 1
    text = prompts.encode(CAPTIONS)
    whole = ["draw: a red ring", "", "draw: draw a blue square"]
    expected = tokenizer.encode(whole, prompts.length)
    np.testing.assert_array_equal(text["ids"], expected[0])
    np.testing.assert_array_equal(text["mask"], expected[1])
    assert text["mask"][1].sum() == 1  # nothing before the dropped caption


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("instruction", ["", "draw: "])
def test_the_template_is_around_instruction_and_caption(tokenizer, generation, instruction):
    both = {"chat_template": True, "add_generation_prompt": generation}
    prompts = make(tokenizer, instruction=instruction, **both)

    def chat(*texts, length=None):
        return tokenizer.chat_rows(texts, length, add_generation_prompt=generation)

    # As published, what the template makes of the instruction is counted up to max_text_tokens.
    assert prompts.length == 8 + len(chat(instruction.rstrip(), length=8)[0]) - 1
    text = prompts.encode(CAPTIONS)
    rows = chat(*(instruction + caption for caption in CAPTIONS if caption), length=prompts.length)
    expected = [rows[0], [tokenizer.bos_id], rows[1]]
    for ids, mask, row in zip(text["ids"], text["mask"], expected, strict=True):
        assert ids[mask].tolist() == row and (ids[~mask] == tokenizer.pad_id).all()


def test_where_captions_are_cut(tokenizer):
    for options in ({"instruction": "draw "}, {"chat_template": True}):
        prompts = make(tokenizer, **options)
        captions = ["", "a", *("a" * n for n in range(2, 30)), "a red ring " * 9]
        longer = make(tokenizer, **options)
        longer.length += 1
        full = longer.encode(captions)["mask"].all(axis=1)
        read = prompts.read(captions)
        assert [k is not None for k in read] == full.tolist()
        assert not full[1] and full[-1]
        for caption, k in zip(captions, read, strict=True):
            if k is not None:  # as many characters as still fit
                assert prompts.counts([caption[:k]])[0] <= prompts.length
                assert prompts.counts([caption[: k + 1]])[0] > prompts.length


def test_clip_reads_the_instruction_and_no_template(tokenizer, tmp_path):
    clip = Tokenizer.load(files.write_clip(tmp_path))
    text = make(tokenizer, clip, instruction="draw: ", chat_template=True).encode(CAPTIONS)
    whole = ["draw: a red ring", "", "draw: draw a blue square"]
    assert text["clip_ids"].shape == (3, 77) and text["clip_ids"].dtype == np.int32
    np.testing.assert_array_equal(text["clip_ids"], clip.encode(whole, 77)[0])


def test_a_tokenizer_without_bos_or_template(tokenizer, tmp_path):
    qwen = files.write_without_bos(tmp_path / "qwen", CAPTIONS)
    prompts = make(Tokenizer.load(qwen), instruction="draw:")
    (alone,) = prompts.tokenizer.rows(["draw:"])
    assert prompts.length == 8 + len(alone)  # there is no BOS that would count twice
    assert prompts.encode(CAPTIONS)["mask"].any(axis=1).all()
    with pytest.raises(ValueError, match=r"data\.chat_template = True, but the tokenizer has no"):
        make(Tokenizer.load(qwen), chat_template=True)
