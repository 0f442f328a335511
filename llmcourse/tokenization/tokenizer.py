"""The tokenizer that the course trains and serves with: byte-level BPE through the `tokenizers` library.

The method, the splitting pattern and the numbering of ids are those of `llmcourse.tokenization.bpe`; this
file adds what production asks for: speed, special tokens, files that `transformers` opens, and refusals.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from llmcourse.runtime import progress
from llmcourse.tokenization.bpe import PATTERN, BytePairEncoding, byte_symbols, check_text
from llmcourse.tokenization.chat_template import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Ids 0 to 7, in this order, in every tokenizer trained here.
SPECIAL_TOKENS = (
    END_OF_TEXT,  # ends a document, and so stands before the next one: both EOS and BOS
    PAD,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",  # ends a turn of a chat
    "<|think|>",
    "</|think|>",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


class Tokenizer:
    """Text to ids and back, without loss: `decode(encode(text)) == text` for every text.

    `encode` reads all text as plain text. The letters `<|end|>` typed by a user become several ordinary ids,
    never the id that ends a turn: otherwise anyone could forge a system message from inside a question
    (prompt injection). The code that builds the structure of a prompt puts special ids in by itself, or says
    `allow_special=True` for text that it wrote.

    Args:
        backend: a `tokenizers.Tokenizer` with a byte-level BPE; it is copied.
        eos_token: ends a document; as BOS it starts one unless `bos_token` says otherwise.
        pad_token: fills rows of a batch.
        bos_token: starts a document; None: the same as `eos_token`.
        chat_template: Jinja source, stored for `transformers`.

    Attributes:
        backend: the copy, set to read special tokens in text as plain text.

    Raises:
        ValueError: a token named is not one of the backend's special tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str = END_OF_TEXT,
        pad_token: str = PAD,
        bos_token: str | None = None,
        chat_template: str | None = CHAT_TEMPLATE,
    ) -> None:
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.eos_token, self.pad_token, self.bos_token = eos_token, pad_token, bos_token or eos_token
        self.chat_template = chat_template
        self.eos_id, self.pad_id, self.bos_id = map(self.special_id, (eos_token, pad_token, self.bos_token))

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        """Pickle as the arguments of `_rebuild`: the backend's own pickle forgets `encode_special_tokens`."""
        text = self.backend.to_str()
        return _rebuild, (text, self.eos_token, self.pad_token, self.bos_token, self.chat_template)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, show_progress: bool = False
    ) -> Tokenizer:
        """Learn a vocabulary; the same texts in any order give the same tokenizer.

        Args:
            texts: the corpus, one document each; read once, never held in memory as a whole.
            vocab_size: number of ids, the 8 special tokens and 256 bytes included.
            min_frequency: a pair seen less often gets no id.
            show_progress: count the documents read on a progress bar.

        Raises:
            ValueError: `vocab_size` is below 264, `min_frequency` is not positive, a text is no `str`, or the
                corpus holds no text.

        Warns:
            UserWarning: the corpus has too few repeated pairs to fill the vocabulary.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size {vocab_size} has no room for {len(SPECIAL_TOKENS)} special tokens and 256 bytes;"
                f" ask for at least {SMALLEST_VOCABULARY}"
            )
        if min_frequency < 1:
            raise ValueError(f"min_frequency is {min_frequency}; it must be at least 1")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=False,
            special_tokens=_special_tokens(),
            initial_alphabet=list(byte_symbols().values()),
        )
        # A failure inside the library's call comes out as one of its own errors, so texts are checked in our
        # generator, which keeps the reason.
        bar = progress(texts, description="reading", unit=" documents", enabled=show_progress)
        reader = _CheckedTexts(bar)
        backend = _new_backend(models.BPE())
        try:
            backend.train_from_iterator(iter(reader), trainer)
        except Exception as error:
            raise (reader.error or error) from None
        if reader.error:
            raise reader.error
        if not reader.characters:
            raise ValueError("the corpus holds no text; give at least one text that is not empty")
        if backend.get_vocab_size() < vocab_size:
            warnings.warn(
                f"the corpus fills only {backend.get_vocab_size()} of {vocab_size} ids (no other pair occurs"
                f" {min_frequency} times); use tokenizer.vocab_size for the model, or more text",
                stacklevel=2,
            )
        return cls(backend)

    @classmethod
    def from_bpe(cls, encoding: BytePairEncoding) -> Tokenizer:
        """Wrap rules learned with `llmcourse.tokenization.bpe`; ids stay the same.

        Raises:
            ValueError: the special tokens of the encoding are not `SPECIAL_TOKENS`.
        """
        if encoding.special_tokens != SPECIAL_TOKENS:
            raise ValueError(
                f"the encoding was trained with special tokens {encoding.special_tokens};"
                " pass special_tokens=llmcourse.tokenization.tokenizer.SPECIAL_TOKENS to train_bpe"
            )
        symbols = byte_symbols()
        names = ["".join(symbols[byte] for byte in token) for token in encoding.vocabulary]
        merges = [(names[left], names[right]) for left, right in encoding.merges]
        backend = _new_backend(models.BPE({name: i for i, name in enumerate(names)}, merges))
        backend.add_special_tokens(_special_tokens())
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included: the least `vocab_size` of a model."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def special_id(self, token: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        if token not in self.special_ids:
            raise ValueError(f"{token!r} is no special token here; use one of {', '.join(self.special_ids)}")
        return self.special_ids[token]

    @cached_property
    def _backend_with_special(self) -> tokenizers.Tokenizer:
        """A second backend, which finds special tokens in text; flipping one switch would race in threads."""
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of one text; nothing is added at either end.

        Args:
            text: any text, the empty one included.
            allow_special: read the names of special tokens as their ids. Never for text from a user.

        Raises:
            ValueError: the text is no `str`, or holds a lone surrogate.
        """
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Return the ids of each text, on all cores; arguments and errors as in `encode`."""
        texts = list(texts)
        for text in texts:
            check_text(text)
        backend = self._backend_with_special if allow_special else self.backend
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 (a cut character) become U+FFFD.

        Args:
            ids: integers, or a one-dimensional integer tensor.
            skip_special: leave special tokens out; otherwise their names are written.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids, size = [int(i) for i in ids], self.vocab_size
        for i in ids:
            if not 0 <= i < size:
                raise ValueError(f"id {i} is not in 0 to {size - 1}; check the tokenizer")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides ids: vocabulary, merges, special tokens, splitting.

        Two tokenizers with one fingerprint give every text the same ids; a model stores it to refuse any
        other.
        """
        serialized = json.loads(self.backend.to_str())
        essence = {
            "vocab": sorted(serialized["model"]["vocab"].items(), key=lambda item: item[1]),
            # older versions of the library write a merge as "a b", newer ones as ["a", "b"]
            "merges": [m.split(" ") if isinstance(m, str) else m for m in serialized["model"]["merges"]],
            "special": sorted(self.special_ids.items(), key=lambda item: item[1]),
            "normalizer": serialized["normalizer"],
            "pre_tokenizer": serialized["pre_tokenizer"],
        }
        return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()

    def check_matches(self, model_vocab_size: int, fingerprint: str | None = None) -> None:
        """Refuse a model that was made for another tokenizer.

        Args:
            model_vocab_size: `ModelConfig.vocab_size` of the model.
            fingerprint: of the tokenizer that the model was trained with, if it is known.

        Raises:
            ValueError: the sizes differ (the message names both), or the fingerprints do.
        """
        if model_vocab_size != self.vocab_size:
            raise ValueError(
                f"the model has vocab_size {model_vocab_size}, the tokenizer {self.vocab_size};"
                " load the tokenizer saved with the model"
            )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"the model was trained with tokenizer {fingerprint[:12]}, not {self.fingerprint[:12]};"
                " load the tokenizer saved with the model"
            )

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` opens.

        Each file appears whole or not at all. Returns the folder, made if need be.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
        }
        _write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Open a folder written by `save`, or by `transformers` for a tokenizer with an EOS token.

        Raises:
            ValueError: the folder lacks a file, or a file cannot be read as a tokenizer.
        """
        folder = Path(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} lacks {name}; give a folder made by Tokenizer.save")
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder}/tokenizer.json is no tokenizer ({error}); save it again") from None
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder}/tokenizer_config.json is no JSON ({error}); save it again") from None
        names = {key: _token_name(config.get(key)) for key in ("eos_token", "pad_token", "bos_token")}
        if names["eos_token"] is None:
            raise ValueError(f"{folder}/tokenizer_config.json names no eos_token; name the end of a text")
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():  # where newer versions of transformers keep it
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(
            backend,
            eos_token=names["eos_token"],
            pad_token=names["pad_token"] or names["eos_token"],
            bos_token=names["bos_token"],
            chat_template=template,
        )

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer as `transformers` knows it.

        It reads special tokens in text as special, as all of `transformers` does unless told
        `split_special_tokens=True`; keep it away from text of users, or tell it so.
        """
        from transformers import PreTrainedTokenizerFast  # slow to import, and needed only here

        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(self.backend.to_str()),
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            pad_token=self.pad_token,
            clean_up_tokenization_spaces=False,
        )
        fast.chat_template = self.chat_template
        return fast


def _rebuild(text: str, eos: str, pad: str, bos: str, chat_template: str | None) -> Tokenizer:
    """A tokenizer from what `Tokenizer.__reduce__` gave."""
    backend = tokenizers.Tokenizer.from_str(text)
    return Tokenizer(backend, eos_token=eos, pad_token=pad, bos_token=bos, chat_template=chat_template)


def _new_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """A byte-level pipeline around a model; the library's own splitting and prefix space are off."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_tokens() -> list[AddedToken]:
    """The special tokens as the library wants them."""
    return [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]


class _CheckedTexts:
    """Passes texts on, counts their characters, and keeps the error that ended the pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.characters = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                check_text(text)
                self.characters += len(text)
                yield text
        except Exception as error:
            self.error = error
            raise


def _token_name(value: object) -> str | None:
    """A token in tokenizer_config.json is a string, or a mapping with its string under "content"."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _write(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
