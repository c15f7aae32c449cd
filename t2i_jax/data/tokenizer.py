"""Texts to token ids: right-padded, cut to a length, with the BOS and EOS that the model expects.

Directories of Hugging Face are read by transformers' fast tokenizers, from the files that are named
here and no others: no pickle and no code of a repository is ever loaded, and nothing is downloaded.
A sentencepiece model alone is read where the sentencepiece package is installed. A tokenizer can
also be trained on the captions of the data.
"""

from collections.abc import Iterable, Sequence
import copy
import functools
import importlib.util
import json
import os
from pathlib import Path
import tempfile
import threading
from typing import Any

from etils import epath
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from t2i_jax.interop.directory import fetch_command

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as Gemma's
_ROLES = ("pad_token", "eos_token", "bos_token", "unk_token")
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_MODEL, _TEMPLATE = "tokenizer.model", "chat_template.jinja"
# Each is a tokenizer; CLIP's may be the second, the published pipelines' the third.
_WHOLE = ((_FILE,), ("vocab.json", "merges.txt"), (_MODEL,))
_BESIDE = (_CONFIG, "special_tokens_map.json", "added_tokens.json", _TEMPLATE)


class Tokenizer:
    """A fast tokenizer of transformers. Safe to use from several threads.

    Attributes:
      bos_id: the token that starts every text, or None: the model has none.
      pad_id: what fills the rows; the end-of-text token where no other is named.
    """

    def __init__(self, fast: Any):
        self._fast = fast
        self._backend = fast.backend_tokenizer
        self._backend.no_padding()  # the file may pad left, or cut: both are done here
        self._backend.no_truncation()
        # "<eos>" in a caption is five characters, no end of the text. The published code reads
        # such captions as control tokens.
        self._backend.encode_special_tokens = True
        self._around = self._find_around()
        self.bos_id = fast.bos_token_id
        if self.bos_id is not None and self._around[0][:1] != [self.bos_id]:
            self._around = ([self.bos_id, *self._around[0]], self._around[1])
        named = (fast.pad_token_id, fast.eos_token_id, self.bos_id)
        self.pad_id = next((token for token in named if token is not None), None)
        if self.pad_id is None:
            raise ValueError(
                f"The tokenizer names no pad_token, eos_token or bos_token: name one in {_CONFIG}."
            )
        self._adds_space = getattr(self._backend.pre_tokenizer, "add_prefix_space", False)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}  # for worker processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _find_around(self) -> tuple[list[int], list[int]]:
        """The ids that the file's post-processor puts before and after a text."""
        encoding = self._backend.encode("a")
        real = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        if not real:
            raise ValueError("The tokenizer makes nothing of the letter a.")
        return encoding.ids[: real[0]], encoding.ids[real[-1] + 1 :]

    @classmethod
    def load(cls, directory: str | os.PathLike, fetch: str = "") -> "Tokenizer":
        """Reads a directory with tokenizer.json, or vocab.json and merges.txt, or tokenizer.model.

        `fetch` is what to type where there is none; by default, what fetches a language model's.
        """
        directory = epath.Path(directory)
        parts = (part for part in _WHOLE if all((directory / name).exists() for name in part))
        whole = next(parts, None)
        if whole is None:
            found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
            state = f"it holds {found[:8]}" if directory.is_dir() else "there is no such directory"
            command = fetch or fetch_command(directory, "llm")
            what = f"Fetch it with `{command}` (accept its licence first)"
            if not fetch:
                what += ", or set weights.tokenizer to '' to train one on the captions"
            raise FileNotFoundError(
                f"No tokenizer: looked for {_FILE}, or vocab.json and merges.txt, in "
                f"{os.fspath(directory)}, {state}. {what}."
            )
        if whole == (_MODEL,) and importlib.util.find_spec("sentencepiece") is None:
            raise FileNotFoundError(
                f"The tokenizer in {os.fspath(directory)} is a sentencepiece model alone: "
                "`pip install sentencepiece` to have it read, or take the tokenizer.json that the "
                "repository of its language model has."
            )
        try:
            return cls(_from_files(directory, (*whole, *_BESIDE)))
        except Exception as error:  # the libraries raise bare Exceptions
            raise ValueError(
                f"{os.fspath(directory / whole[0])} cannot be read: {error}"
            ) from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE on `captions`, of at most `vocab_size` tokens. Any text encodes."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + len(SPECIAL)
        if vocab_size < least:
            raise ValueError(
                f"pretrain.vocab_size={vocab_size}: the bytes and the special tokens alone are "
                f"{least}; give that or more."
            )
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        # A space in front, so that a word is the same token at the start as in the middle.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A $B",
            special_tokens=[("<bos>", SPECIAL.index("<bos>"))],
        )
        named = dict(zip(_ROLES, SPECIAL, strict=True))
        return cls(_transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **named))

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a directory that `load` and transformers' AutoTokenizer read.

        The last file to get its name is the one without which there is none (`is_saved`): also on
        gs://, where a directory cannot be renamed as one.
        """
        directory = epath.Path(directory)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **{role: str(getattr(self._fast, role)) for role in _ROLES if self._has(role)},
        }
        texts = {_CONFIG: json.dumps(settings, indent=2, ensure_ascii=False)}
        if self.has_chat_template:
            texts[_TEMPLATE] = self._fast.chat_template
        texts[_FILE] = self._backend.to_str(pretty=True)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            new = directory / f"{name}.new"
            new.write_text(text)
            new.replace(directory / name)

    @staticmethod
    def is_saved(directory: str | os.PathLike) -> bool:
        """Whether there is one that `save` has written to its end."""
        return (epath.Path(directory) / _FILE).exists()

    def _has(self, role: str) -> bool:
        return getattr(self._fast, role) is not None

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (n, length) and mask bool (n, length), True where there is a token."""
        return self.pad(self.rows(texts, length), length)

    def rows(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """The ids of each text, cut to `length`, BOS first where there is one and EOS last.

        Whether there are BOS and EOS is the tokenizer's own rule (Gemma: BOS; CLIP: both, the EOS
        also where the text is cut; Qwen: none), but a BOS that it names it has.
        """
        before, after = self._around
        room = None if length is None else length - len(before) - len(after)
        if room is not None and room < 0:
            raise ValueError(f"length={length}; BOS and EOS alone take {len(before) + len(after)}")
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*before, *encoding.ids[:room], *after] for encoding in encoded]

    def chat_rows(
        self, texts: Sequence[str], length: int | None = None, *, add_generation_prompt: bool
    ) -> list[list[int]]:
        """The ids of each text as one user turn of the chat template, cut to `length`.

        The template writes the special tokens, BOS too. Raises ValueError where there is none.
        """
        if not self.has_chat_template:
            raise ValueError("The tokenizer has no chat template.")
        rows = []
        for text in texts:
            with self._lock:  # transformers' part of a tokenizer is not safe to share
                ids = self._chat.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=add_generation_prompt,
                    sanitize_control_tokens=True,  # those of the text, as above
                    return_dict=False,
                )
            rows.append(list(ids)[:length])
        return rows

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_rows` can be used."""
        return bool(self._fast.chat_template)

    @functools.cached_property
    def _chat(self) -> Any:
        """A copy whose special tokens are read as such where the template writes them."""
        chat = copy.deepcopy(self._fast)
        chat.backend_tokenizer.encode_special_tokens = False
        return chat

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ids, none longer than `length` -> ids and mask, as `encode` returns them.

        An empty row, which is '' where the model has no BOS, is one padding token that the mask
        calls real: attention to a text of no tokens at all is not defined.
        """
        ids = np.full((len(rows), length), self.pad_id, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([max(len(tokens), 1) for tokens in rows], int)
        return ids, np.arange(length) < lengths[:, None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a row of ids, without its special tokens."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text[1:] if self._adds_space and text.startswith(" ") else text

    @functools.cached_property
    def vocab_size(self) -> int:
        """The least number of embeddings that has a row for every id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1


def _from_files(directory: epath.Path, names: Iterable[str]) -> Any:
    """transformers' fast tokenizer of these files, as far as they are there, and of no others."""
    with tempfile.TemporaryDirectory() as here:
        for name in names:
            if (directory / name).exists():
                (Path(here) / name).write_bytes((directory / name).read_bytes())
        settings = Path(here) / _CONFIG
        named = json.loads(settings.read_text()) if settings.exists() else {}
        # What is trained here says that it needs no class of its own, and AutoTokenizer, which
        # would look for one, takes as long as all the rest.
        plain = named.get("tokenizer_class") == "PreTrainedTokenizerFast"
        library = _transformers()
        loader = library.PreTrainedTokenizerFast if plain else library.AutoTokenizer
        fast = loader.from_pretrained(here, trust_remote_code=False, local_files_only=True)
    if not fast.is_fast:
        raise ValueError(f"{type(fast).__name__} is not a fast tokenizer")
    return fast


def _transformers() -> Any:
    """The library, which takes a second to import and says that it misses PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
