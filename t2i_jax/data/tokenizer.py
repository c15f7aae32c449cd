"""Captions to token ids, the way Gemma sees them: BOS first, right-padded, cut to a length.

Reads `tokenizer.json` through the `tokenizers` library alone: no sentencepiece model, no pickle and
no code of a repository is ever loaded. A tokenizer can also be trained on the captions of the data.
"""

from collections.abc import Iterable, Sequence
import functools
import json
import os
import uuid

from etils import epath
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from t2i_jax.interop.directory import fetch_command

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as Gemma's
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_USUAL = {  # where tokenizer_config.json does not say; the first that the vocabulary has
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>", "[CLS]"),
    "pad_token": ("<pad>", "[PAD]", "<eos>", "</s>", "<|end_of_text|>", "<unk>"),
}


class Tokenizer:
    """A fast tokenizer with a BOS and a padding token. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict | None = None):
        self._backend = backend
        self._config = dict(config or {})
        backend.no_padding()  # the file may pad left, or cut: both are done here
        backend.no_truncation()
        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        self._adds_space = getattr(backend.pre_tokenizer, "add_prefix_space", False)

    def _special_id(self, role: str) -> int:
        named = self._config.get(role)
        named = named.get("content") if isinstance(named, dict) else named
        for token in ([named] if named else []) + list(_USUAL[role]):
            token_id = self._backend.token_to_id(token)
            if token_id is not None:
                return token_id
        raise ValueError(
            f"The tokenizer has no {role}: {named or 'nothing'} in {_CONFIG}, none of "
            f"{_USUAL[role]} in the vocabulary. Name it in {_CONFIG}."
        )

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Reads a directory with tokenizer.json, as Hugging Face repositories hold it."""
        directory = epath.Path(directory)
        if not (directory / _FILE).exists():
            found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
            state = f"it holds {found[:8]}" if directory.is_dir() else "there is no such directory"
            raise FileNotFoundError(
                f"No tokenizer: looked for {_FILE} in {os.fspath(directory)} (weights.tokenizer), "
                f"{state}. Fetch it with `{fetch_command(directory, 'llm')}` (accept its licence "
                "first), or set weights.tokenizer to '' to train one on the captions."
            )
        config = directory / _CONFIG
        try:
            settings = json.loads(config.read_text()) if config.exists() else {}
            backend = tokenizers.Tokenizer.from_str((directory / _FILE).read_text())
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{os.fspath(directory / _FILE)} cannot be read: {error}") from error
        return cls(backend, settings)

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
        names = ("pad_token", "eos_token", "bos_token", "unk_token")
        return cls(backend, dict(zip(names, SPECIAL, strict=True)))

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a directory that `load` and transformers' AutoTokenizer read, all or nothing."""
        directory = epath.Path(directory)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **self._config,
        }
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
        temporary.mkdir()
        (temporary / _FILE).write_text(self._backend.to_str(pretty=True))
        (temporary / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False))
        try:
            temporary.rename(directory)
        except OSError:  # there is one already: replace its files one by one
            for name in (_CONFIG, _FILE):
                (temporary / name).replace(directory / name)
            temporary.rmdir()

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 (n, length) and mask bool (n, length), True where there is a token.

        BOS comes first and once, whatever the file's post-processor does; no EOS is added.
        """
        if length < 1:
            raise ValueError(f"length={length}; BOS alone takes one token")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        lengths = np.ones(len(texts), np.int64)
        ids[:, 0] = self.bos_id
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in enumerate(encoded):
            tokens = encoding.ids
            if tokens and tokens[0] == self.bos_id:  # the text spells it out
                tokens = tokens[1:]
            tokens = tokens[: length - 1]
            ids[row, 1 : 1 + len(tokens)] = tokens
            lengths[row] += len(tokens)
        return ids, np.arange(length) < lengths[:, None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a row of ids, without its special tokens."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text[1:] if self._adds_space and text.startswith(" ") else text

    @functools.cached_property
    def vocab_size(self) -> int:
        """The least number of embeddings that has a row for every id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
