"""Documents that are read while training goes on: what a source is, and its documents tokenized into batches.

A corpus that does not fit into memory is never one array of tokens. Documents come one by one from a source
whose position is plain data, are tokenized as they come, and fill rows from end to end. Everything can stop
after any batch and go on, in another process, with the very next token.

Legend: B rows of a batch, T context_length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from llmcourse.data.token_stream import Encoder

CHUNK = 64  # documents tokenized at once: enough for the tokenizer's threads, and few to repeat on resume
Batch = dict[str, torch.Tensor]


class DocumentSource(Protocol):
    """Documents without end whose order is fixed by a seed and whose position can be saved."""

    @property
    def epoch(self) -> float:
        """Passes over the source so far, the fraction of the current one included."""

    def next(self) -> Any:
        """The next document: a text, or a row of columns with the text under "text"."""

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in, as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""


def check_identity(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a saved position that belongs to something else.

    Raises:
        ValueError: one of the `own` entries differs in `saved`, or is missing there.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the saved {what} has {name}={saved.get(name)}, this one has {name}={value}:"
                " resume with the settings and the corpus of the saved run"
            )


class ListSource:
    """A corpus in memory, or memory-mapped as a `datasets.Dataset`, as a source: each epoch in a new order."""

    def __init__(self, documents: Sequence[Any], *, seed: int = 0) -> None:
        """Begin at the first epoch.

        Args:
            documents: texts or rows, by number; not copied.
            seed: at least 0; with the epoch's number it fixes that epoch's order.

        Raises:
            ValueError: no documents, or a negative seed.
        """
        if not len(documents):
            raise ValueError("the source holds no documents: leave it out of the mixture")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        self.documents, self.seed, self.position = documents, seed, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def epoch(self) -> float:
        """Passes over the documents so far."""
        return self.position / len(self.documents)

    def next(self) -> Any:
        """The next document of the endless sequence of epochs."""
        epoch, place = divmod(self.position, len(self.documents))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
        self.position += 1
        return self.documents[int(self._order[1][place])]

    def _identity(self) -> dict[str, int]:
        return {"n_documents": len(self.documents), "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The position, the number of documents and the seed."""
        return {"position": self.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state has another number of documents or another seed.
        """
        check_identity("source", state, self._identity())
        self.position = int(state["position"])


@dataclass
class _Chunk:
    """Tokens of some documents, and where the source stood before them."""

    state: dict[str, Any]
    first_document: int
    tokens: np.ndarray  # (n,) int64, each document ended by end of text
    documents: np.ndarray  # (n,) int64, number of the document that each token belongs to


class StreamedBatches:
    """Endless batches from a source of documents: `{"tokens", "targets", "documents"}`, each (B, T) int64.

    Every document is tokenized and ended by the end-of-text token; the tokens of all documents, in the source's
    order, are the targets of the rows, T at a time, each exactly once and none missing. The input at each
    place is the token before; before the first is an end of text. `documents` numbers the document that the target
    belongs to, counted from the stream's beginning, so a mask can keep documents of a row apart.

    With several processes either every rank reads its own part (a `ShardStream` made with rank and world_size;
    each rank then saves its own state), or, with `rank` and `world_size` given here, all read the same source
    and each keeps its rows: then the state is the same on every rank, which is what `fit` saves, the ranks'
    batches one after another are those of one process with n times the rows, and the price is that every rank
    tokenizes everything.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Encoder,
        *,
        batch_size: int,
        context_length: int,
        column: str = "text",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the batches, from where the source stands.

        Args:
            source: gives texts, or rows that hold the text in `column`.
            tokenizer: gives the ids.
            batch_size: rows that each process gets, B.
            context_length: tokens of a row, T.
            column: where a row holds its text.
            rank: which rows of each global batch are this process's.
            world_size: processes that share a global batch and read the same source.

        Raises:
            ValueError: a size below 1, or a rank outside the world.
        """
        if batch_size < 1 or context_length < 1:
            raise ValueError(
                f"batch_size={batch_size}, context_length={context_length}: both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to world_size - 1 = {world_size - 1}")
        self.source, self.tokenizer, self.column = source, tokenizer, column
        self.batch_size, self.context_length = batch_size, context_length
        self.rank, self.world_size = rank, world_size
        self._chunks: deque[_Chunk] = deque()
        self._used = 0  # tokens of the oldest chunk that were given out
        self._previous = tokenizer.eos_id
        self._n_documents = 0

    @property
    def epoch(self) -> float:
        """Passes over the source so far, up to `CHUNK` documents ahead of what was given out."""
        return self.source.epoch

    def next(self) -> Batch:
        """This rank's next batch."""
        rows = self.batch_size * self.world_size
        targets, documents = self._take(rows * self.context_length)
        tokens = np.concatenate([[self._previous], targets[:-1]])
        self._previous = int(targets[-1])
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        columns = {"tokens": tokens, "targets": targets, "documents": documents}
        return {
            name: torch.from_numpy(values.reshape(rows, self.context_length)[mine].copy())
            for name, values in columns.items()
        }

    def _take(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n tokens and their documents' numbers; chunks that are used up are forgotten."""
        while sum(len(chunk.tokens) for chunk in self._chunks) - self._used < n:
            self._chunks.append(self._read())
        parts, missing = [], n
        while missing:
            chunk = self._chunks[0]
            end = min(len(chunk.tokens), self._used + missing)
            parts.append((chunk.tokens[self._used : end], chunk.documents[self._used : end]))
            missing -= end - self._used
            self._used = end
            if end == len(chunk.tokens):
                self._chunks.popleft()
                self._used = 0
        tokens, documents = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(documents)

    def _read(self) -> _Chunk:
        state, first = self.source.state_dict(), self._n_documents
        texts = [self._text(self.source.next()) for _ in range(CHUNK)]
        ids = [[*document, self.tokenizer.eos_id] for document in self.tokenizer.encode_batch(texts)]
        lengths = [len(document) for document in ids]
        self._n_documents += len(ids)
        numbers = np.repeat(np.arange(first, first + len(ids)), lengths)
        return _Chunk(state, first, np.concatenate([np.asarray(part, np.int64) for part in ids]), numbers)

    def _text(self, document: Any) -> str:
        text = document if isinstance(document, str) else document[self.column]
        if not isinstance(text, str):
            raise ValueError(
                f"a document's {self.column!r} is {type(text).__name__}, not text: name its column"
            )
        return text

    def _identity(self) -> dict[str, int]:
        return {
            "context_length": self.context_length,
            "global_batch_size": self.batch_size * self.world_size,
            "chunk": CHUNK,
            "eos_id": self.tokenizer.eos_id,
            "vocab_size": self.tokenizer.vocab_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the source stood before the oldest unfinished chunk, and how much of that chunk was used."""
        oldest = self._chunks[0] if self._chunks else None
        return self._identity() | {
            "source": oldest.state if oldest else self.source.state_dict(),
            "documents": oldest.first_document if oldest else self._n_documents,
            "used": self._used,
            "previous": self._previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position: up to `CHUNK` documents are read and tokenized again.

        Raises:
            ValueError: the state belongs to another context length, global batch size, tokenizer or source.
        """
        check_identity("batches", state, self._identity())
        self.source.load_state_dict(state["source"])
        self._chunks.clear()
        self._used, self._previous = int(state["used"]), int(state["previous"])
        self._n_documents = int(state["documents"])
