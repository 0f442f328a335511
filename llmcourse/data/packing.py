"""From a stream of tokens to batches of fixed shape: windows for training, whole documents for evaluation.

A causal language model learns from rows of `context_length` tokens. Training cuts the stream of all documents
into windows, so that no position is padding. Evaluation keeps documents whole, so that the summed loss of a
document is its code length under the model and can be compared with its true information content.

Legend: B rows of a batch, T context_length, N tokens of the stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llmcourse.data.token_stream import TokenStream, tokenize

__all__ = ["IGNORE", "PackedBatches", "TokenStream", "tokenize", "whole_document_batches"]

IGNORE = -100  # target of a position that has none; torch's cross_entropy skips it by default

Batch = dict[str, torch.Tensor]


class PackedBatches:
    """Endless batches of windows of a token stream, each `{"tokens": (B, T) int64, "targets": (B, T) int64}`.

    `targets[b, t]` is the token that follows `tokens[b, t]` in the stream. The stream is read as a ring: its
    last end-of-text token predicts the first token of its first document. Each epoch cuts the ring at a
    random place, lays ceil(N / T) windows end to end from there, and visits them in random order, so every
    token is a target exactly once per epoch, and windows begin elsewhere in every epoch. Positions of the
    last window that would count a token a second time have the target -100.

    Windows ignore document borders: a document that straddles one is split, as is every document longer than
    the context (`TokenStream.n_longer_than` counts those), and a row may hold several documents that attend
    to each other.

    The batch is a pure function of (seed, position). At position p, rank r of n processes gets rows
    [(p n + r) B, (p n + r + 1) B) of one endless sequence of rows. So the ranks' batches, one after another,
    are the batch of a single process with n times the rows, and a run may resume with another number of
    processes as long as B times n stays the same.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the source, at position 0.

        Args:
            stream: the tokenized corpus; not copied.
            batch_size: rows that each process gets, B.
            context_length: tokens of a row, T.
            seed: at least 0; with the epoch's number it fixes that epoch's cut and order.
            rank: this process, from 0.
            world_size: number of processes that share each global batch.

        Raises:
            ValueError: a size below 1, a rank outside the world, a negative seed, or a stream of fewer than T
                + 1 tokens.
        """
        if batch_size < 1 or context_length < 1:
            raise ValueError(
                f"batch_size={batch_size}, context_length={context_length}: both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to world_size - 1 = {world_size - 1}")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        if len(stream) <= context_length:
            raise ValueError(
                f"the stream has {len(stream)} tokens, one window needs {context_length + 1}:"
                " use more documents or a smaller context_length"
            )
        self.stream, self.batch_size, self.context_length, self.seed = (
            stream,
            batch_size,
            context_length,
            seed,
        )
        self.rank, self.world_size, self.position = rank, world_size, 0
        self._plans: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def windows_per_epoch(self) -> int:
        """ceil(N / T)."""
        return -(-len(self.stream) // self.context_length)

    @property
    def global_batch_size(self) -> int:
        """Rows of all processes together at one position."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> float:
        """Passes over the stream so far, the fraction of the current one included."""
        return self.position * self.global_batch_size / self.windows_per_epoch

    def at(self, position: int) -> Batch:
        """This rank's batch at an integer position; does not move the source."""
        first = position * self.global_batch_size + self.rank * self.batch_size
        windows = np.array([self._window(row) for row in range(first, first + self.batch_size)])
        starts, n_targets = windows[:, :1], windows[:, 1:]
        slots = np.arange(self.context_length + 1)
        rows = torch.from_numpy(self.stream.tokens[(starts + slots) % len(self.stream)].astype(np.int64))
        tokens, targets = rows[:, :-1].clone(), rows[:, 1:].clone()  # apart: targets are masked in place
        targets[torch.from_numpy(slots[:-1] >= n_targets)] = IGNORE
        return {"tokens": tokens, "targets": targets}

    def _window(self, row: int) -> tuple[int, int]:
        """Where on the ring a row of the endless sequence starts, and how many of its targets count."""
        epoch, index = divmod(row, self.windows_per_epoch)
        cut, order = self._plan(epoch)
        start = int(order[index]) * self.context_length
        return cut + start, min(self.context_length, len(self.stream) - start)

    def _plan(self, epoch: int) -> tuple[int, np.ndarray]:
        """The epoch's cut of the ring and its order of windows; the last two epochs are kept."""
        if epoch not in self._plans:
            generator = np.random.default_rng((self.seed, epoch))
            plan = int(generator.integers(len(self.stream))), generator.permutation(self.windows_per_epoch)
            self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1} | {epoch: plan}
        return self._plans[epoch]

    def next(self) -> Batch:
        """This rank's batch at the current position; moves one position on."""
        batch = self.at(self.position)
        self.position += 1
        return batch

    def __next__(self) -> Batch:
        return self.next()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "context_length": self.context_length,
            "global_batch_size": self.global_batch_size,
            "n_tokens": len(self.stream),
            "checksum": self.stream.checksum,
        }

    def state_dict(self) -> dict[str, int]:
        """The position and what it is a position in: plain integers, the same on every rank."""
        return {"position": self.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to another corpus, seed, context length or global batch size.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved batches have {name}={state.get(name)}, these have {name}={value}:"
                    " resume with the settings and the corpus of the saved run"
                )
        self.position = int(state["position"])


def whole_document_batches(stream: TokenStream, *, batch_size: int, context_length: int) -> list[Batch]:
    """All documents as batches for evaluation, none cut that fits into the context.

    Each document's tokens and its final end of text are targets, each exactly once; the first token is
    predicted from the end-of-text token before it. So the targets number exactly N, and the summed loss is
    the code length of the corpus under the model, in expectation at least the documents' information content.

    Rows are filled by best-fit decreasing: the longest documents first, each into the fullest row that still
    has room. A document of more than T tokens (end of text counted; `TokenStream.n_longer_than` counts them)
    is split into pieces of T; each further piece begins a row, with the token before it as its first input,
    and has lost the context before that. Later documents of a row can attend to earlier ones, as in training.

    Args:
        stream: the tokenized documents.
        batch_size: rows of a batch, B; the last batch may have fewer.
        context_length: tokens of a row, T.

    Returns:
        Batches `{"tokens", "targets", "documents"}`, each (B, T) int64. `documents` is the index in the
        stream of the document that the target belongs to. Padding has the end-of-text token as input, target
        -100 and document -1.

    Raises:
        ValueError: a size below 1.
    """
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"batch_size={batch_size}, context_length={context_length}: both must be at least 1")
    rows = _best_fit(stream.lengths, context_length)
    shape = (len(rows), context_length)
    tokens, targets, documents = np.full(shape, stream.eos_id), np.full(shape, IGNORE), np.full(shape, -1)
    for row, pieces in enumerate(rows):
        slot = 0
        for document, first, length in pieces:
            ids = stream.document(document)
            end = slot + length
            tokens[row, slot + (first == 0) : end] = ids[max(first - 1, 0) : first + length - 1]
            targets[row, slot:end] = ids[first : first + length]
            documents[row, slot:end] = document
            slot = end
    columns = {"tokens": tokens, "targets": targets, "documents": documents}
    return [
        {
            name: torch.from_numpy(values[i : i + batch_size].astype(np.int64))
            for name, values in columns.items()
        }
        for i in range(0, len(rows), batch_size)
    ]


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (document, first token, number of tokens) that fill at most `capacity` slots each.

    Pieces after a document's first open rows of their own; whole documents then go, longest first, where they
    leave the least room. `room` holds (slots left, row) in increasing order, so the best fit is one bisection
    away.
    """
    rows: list[list[tuple[int, int, int]]] = []
    room: list[tuple[int, int]] = []

    def open_row(piece: tuple[int, int, int]) -> None:
        rows.append([piece])
        insort(room, (capacity - piece[2], len(rows) - 1))

    for document in np.flatnonzero(lengths > capacity).tolist():
        length = int(lengths[document])
        for first in range(0, length, capacity):
            open_row((document, first, min(capacity, length - first)))
    whole = np.flatnonzero(lengths <= capacity)
    for document in whole[np.argsort(-lengths[whole], kind="stable")].tolist():
        piece = (document, 0, int(lengths[document]))
        best = bisect_left(room, (piece[2], 0))
        if best == len(room):
            open_row(piece)
        else:
            left, row = room.pop(best)
            rows[row].append(piece)
            insort(room, (left - piece[2], row))
    return rows
