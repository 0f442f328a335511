"""A corpus as one long array of token ids: every document followed by the end-of-text token.

Legend: N tokens of the stream, M documents.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmcourse.runtime import progress as progress_bar

CHUNK = 512  # documents per call of encode_batch: enough for its threads, small in memory

Encoded = tuple[np.ndarray, np.ndarray]  # ids of a chunk, each document ended; length of each document


class Encoder(Protocol):
    """What `tokenize` needs of a tokenizer; `llmcourse.tokenization.tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-text token."""


@dataclass(frozen=True, eq=False)
class TokenStream:
    """All documents of a corpus in one array.

    Attributes:
        tokens: (N,) uint16 when the vocabulary has at most 65 536 entries, else uint32; in memory or
            memory-mapped.
        offsets: (M + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]` and ends with `eos_id`.
        eos_id: the token that ends each document.
        vocab_size: size of the vocabulary that the ids index.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    eos_id: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.offsets.ndim != 1 or not len(self.offsets) or self.offsets[0] != 0:
            raise ValueError(f"offsets must be one row that starts with 0, got shape {self.offsets.shape}")
        if self.offsets[-1] != len(self.tokens):
            raise ValueError(
                f"offsets end at {self.offsets[-1]}, but the stream has {len(self.tokens)} tokens"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Number of documents, M."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(M,) int64 tokens of each document, its end-of-text token included."""
        return np.diff(self.offsets)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of tokens and offsets: equal for equal corpora, almost surely different otherwise."""
        return zlib.crc32(np.ascontiguousarray(self.offsets), zlib.crc32(np.ascontiguousarray(self.tokens)))

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, its end-of-text token included: a view, not a copy."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def n_longer_than(self, context_length: int) -> int:
        """Number of documents that no row can hold: more than `context_length` tokens, end of text
        counted."""
        return int((self.lengths > context_length).sum())

    def save(self, folder: str | Path) -> Path:
        """Write tokens.npy, offsets.npy and, last, stream.json, without which `load` sees no stream."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "stream.json"
        header.unlink(missing_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        np.save(folder / "offsets.npy", self.offsets)
        values = {"eos_id": self.eos_id, "vocab_size": self.vocab_size, "n_tokens": len(self)}
        header.write_text(json.dumps(values | {"n_documents": self.n_documents}), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> TokenStream:
        """Open a saved stream; the tokens stay on disk, memory-mapped.

        Raises:
            ValueError: the folder holds no complete stream.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
            tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            offsets = np.load(folder / "offsets.npy")
            if (len(tokens), len(offsets) - 1) != (header["n_tokens"], header["n_documents"]):
                raise ValueError(f"{len(tokens)} tokens where stream.json says {header['n_tokens']}")
            return cls(tokens, offsets, header["eos_id"], header["vocab_size"])
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} holds no complete token stream ({error}): tokenize the corpus again"
            ) from error


def tokenize(
    documents: Any, tokenizer: Encoder, *, column: str = "text", workers: int = 1, progress: bool = True
) -> TokenStream:
    """Tokenize a corpus into one stream, each document followed by the end-of-text token.

    Args:
        documents: a `datasets.Dataset` or `IterableDataset`, or any iterable of texts; read once, in order.
        tokenizer: gives the ids; an empty text becomes a lone end-of-text token.
        column: the column of a data set that holds the text.
        workers: threads that call `encode_batch`; the result is the same for any number. The production
            tokenizer computes outside Python's lock and on all cores already, so a second thread only hides
            the time in which results become arrays: about an eighth of the whole on two cores.
        progress: show a bar with the documents so far and, where the size is known, the time left.

    Raises:
        ValueError: no documents, a data set without that column, or something that is not a text.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    ids = array("H" if tokenizer.vocab_size <= 2**16 else "I")
    lengths = array("q")
    total = len(documents) if hasattr(documents, "__len__") else None
    with progress_bar(total=total, description="tokenize", unit="doc", enabled=progress) as bar:
        for chunk_ids, chunk_lengths in _encode_chunks(_chunks(documents, column), tokenizer, workers):
            ids.frombytes(chunk_ids.astype(ids.typecode, copy=False).tobytes())
            lengths.frombytes(chunk_lengths.tobytes())
            bar.update(len(chunk_lengths))
    if not lengths:
        raise ValueError("the corpus holds no documents: check its name, its filter or its split")
    offsets = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, np.int64))])
    return TokenStream(np.frombuffer(ids, ids.typecode), offsets, tokenizer.eos_id, tokenizer.vocab_size)


def _chunks(documents: Any, column: str) -> Iterator[list[str]]:
    """Lists of at most `CHUNK` texts."""
    if isinstance(documents, str):
        raise ValueError("documents is a single text: pass a list of texts or a data set")
    if hasattr(documents, "column_names"):  # a datasets.Dataset or IterableDataset
        if documents.column_names is not None and column not in documents.column_names:
            raise ValueError(f"the data set has no column {column!r}: choose one of {documents.column_names}")
        chunks: Iterator[list[str]] = (rows[column] for rows in documents.iter(batch_size=CHUNK))
    else:
        texts = iter(documents)
        chunks = iter(lambda: list(islice(texts, CHUNK)), [])
    for chunk in chunks:
        kinds = {type(text) for text in chunk if not isinstance(text, str)}
        if kinds:
            name = kinds.pop().__name__
            raise ValueError(f"a document is {name}, not text: filter the corpus or name its text column")
        yield chunk


def _encode(tokenizer: Encoder, chunk: list[str]) -> Encoded:
    batch = tokenizer.encode_batch(chunk)
    lengths = np.fromiter((len(ids) + 1 for ids in batch), np.int64, len(batch))
    eos = (tokenizer.eos_id,)
    parts = chain.from_iterable((ids, eos) for ids in batch)
    return np.fromiter(chain.from_iterable(parts), np.uint32, lengths.sum()), lengths


def _encode_chunks(chunks: Iterable[list[str]], tokenizer: Encoder, workers: int) -> Iterator[Encoded]:
    if workers == 1:
        yield from (_encode(tokenizer, chunk) for chunk in chunks)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_encode, tokenizer, chunk))
            if len(pending) > 2 * workers:  # bounded: a streamed corpus must not pile up here
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
