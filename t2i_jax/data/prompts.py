"""Captions to what the networks read of them: one rule for training and for sampling."""

import bisect
from collections.abc import Sequence

from ml_collections import ConfigDict
import numpy as np

from t2i_jax.data.tokenizer import Tokenizer


class Prompts:
    """Puts the instruction before captions, wraps them in the chat template, makes tokens of them.

    '' is the dropped caption, with nothing before or around it. `data` is the config's section.

    As published, the instruction takes no room from the captions: rows have `max_text_tokens` and
    the tokens of the instruction (with the chat template: of the templated instruction), BOS not
    counted twice (the published code takes one off where a tokenizer has no BOS, too). It counts
    an instruction without its trailing spaces, and at most `max_text_tokens` of it; so do we. In
    sampling it has no chat template; we do as in training.

    Attributes:
      length: T, the length of a row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: ConfigDict,
        clip_tokenizer: Tokenizer | None = None,
        clip_length: int = 77,
    ):
        self.tokenizer = tokenizer
        self._clip_tokenizer, self._clip_length = clip_tokenizer, clip_length
        self._instruction = data.instruction
        self._chat, self._generation = data.chat_template, data.add_generation_prompt
        if self._chat and not tokenizer.has_chat_template:
            raise ValueError(
                "data.chat_template = True, but the tokenizer has no chat template; name that of "
                "an instruction-tuned model in weights.tokenizer."
            )
        (row,) = self._rows([data.instruction.rstrip()], data.max_text_tokens)
        bos = tokenizer.bos_id is not None
        self.length = data.max_text_tokens + len(row) - bos

    def _rows(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        if not self._chat:
            return self.tokenizer.rows(texts, length)
        generation = self._generation
        return self.tokenizer.chat_rows(texts, length, add_generation_prompt=generation)

    def _texts(self, captions: Sequence[str]) -> list[str]:
        return [self._instruction + caption if caption else "" for caption in captions]

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """{'ids': int32 (n, T), 'mask': bool (n, T)}, the mask True on tokens.

        With a CLIP tokenizer also 'clip_ids', int32 (n, 77): the same text, without the template.
        """
        texts = self._texts(captions)
        spoken = iter(self._rows([text for text in texts if text], self.length))
        (silent,) = self.tokenizer.rows([""], self.length)
        rows = [next(spoken) if text else silent for text in texts]
        ids, mask = self.tokenizer.pad(rows, self.length)
        if self._clip_tokenizer is None:
            return {"ids": ids, "mask": mask}
        clip_ids, _ = self._clip_tokenizer.encode(texts, self._clip_length)
        return {"ids": ids, "mask": mask, "clip_ids": clip_ids}

    def counts(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption makes with what is put around it, before it is cut."""
        texts = self._texts(captions)
        spoken = iter(self._rows([text for text in texts if text], None))
        (silent,) = self.tokenizer.rows([""])
        return [len(next(spoken) if text else silent) for text in texts]

    def read(self, captions: Sequence[str]) -> list[int | None]:
        """How many characters are read of each caption that is cut; None of the others."""

        def fits(caption: str) -> int:
            ends = range(len(caption) + 1)
            return bisect.bisect(ends, self.length, key=lambda k: self.counts([caption[:k]])[0]) - 1

        counts = self.counts(captions)
        return [
            fits(caption) if count > self.length else None
            for caption, count in zip(captions, counts, strict=True)
        ]
