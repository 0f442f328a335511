"""Conversations as training data: ids, which of them the assistant writes, and batches of them.

A conversation is a list of messages {"role", "content"}. The model learns only what the assistant writes, the token
that ends its turn included; all else is context and has the target -100.

Legend: B rows, T slots of a row, M conversations, N ids of all conversations.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llmcourse.data.chat_formats import ChatFormat, CourseFormat, Messages, TemplateFormat, chat_format
from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.packing import IGNORE

__all__ = [
    "ChatFormat", "CourseFormat", "InstructionBatches", "InstructionSet", "Messages", "TemplateFormat", "chat_format",
    "encode_conversation", "encode_conversations", "pack", "padded_width",
]  # fmt: skip

TRUNCATIONS = ("drop", "turns", "end")
LOSSES_ON = ("assistant", "last", "all")
PAD_MULTIPLE = 16  # widths of padded batches are multiples of this, so that kernels meet few different shapes


@dataclass(frozen=True, eq=False)
class InstructionSet:
    """Encoded conversations, one behind the other, and what became of those that were read."""

    tokens: np.ndarray
    """(N,) int32 ids"""
    learned: np.ndarray
    """(N,) bool, whether an id is a target of the loss"""
    offsets: np.ndarray
    """(M + 1,) int64; conversation i is tokens[offsets[i]:offsets[i + 1]]"""
    pad_id: int
    """fills rows of a batch"""
    counts: Mapping[str, int]
    """conversations read, kept, shortened, too_long (dropped) and without_answer (dropped)"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(M,) int64 ids of each conversation."""
        return np.diff(self.offsets)

    @property
    def n_targets(self) -> int:
        """Ids that the model learns to write."""
        return int(self.learned.sum())

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of ids, mask and borders."""
        crc = zlib.crc32(np.ascontiguousarray(self.offsets), zlib.crc32(np.ascontiguousarray(self.tokens)))
        return zlib.crc32(np.packbits(self.learned), crc)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of conversation `index`, both (length - 1,) int64; no target is -100."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.tokens[part].astype(np.int64)
        return ids[:-1], np.where(self.learned[part][1:], ids[1:], IGNORE)


def encode_conversation(
    messages: Messages, chat: ChatFormat, loss_on: str = "assistant"
) -> tuple[list[int], list[bool]]:
    """Ids of one conversation, and for each whether it is a target of the loss.

    Args:
        messages: the conversation.
        chat: the format.
        loss_on: "assistant": all that the assistant writes; "last": its last turn only; "all": every id but the
            first, as in pre-training.

    Raises:
        ValueError: the assistant writes nothing in it, an unknown `loss_on`, or what the format refuses.
    """
    if loss_on not in LOSSES_ON:
        raise ValueError(f"loss_on={loss_on!r}: choose one of {', '.join(LOSSES_ON)}")
    ids, written = chat.encode(messages)
    if not any(written):
        raise ValueError("the conversation has no assistant turn: there is nothing in it to learn from")
    if loss_on == "all":
        return ids, [True] * len(ids)
    if loss_on == "last":
        end = len(written) - written[::-1].index(True)
        start = end - written[:end][::-1].index(False) if False in written[:end] else 0
        written = [start <= place < end for place in range(len(written))]
    return ids, written


def encode_conversations(
    conversations: Iterable[Messages],
    chat: ChatFormat,
    *,
    context_length: int,
    truncation: str = "drop",
    loss_on: str = "assistant",
) -> InstructionSet:
    """Encode a data set; what does not fit or has no answer is counted in the result's `counts`.

    A conversation fits if the model can read all of it but the last id, which is only a target: it has at most
    context_length + 1 ids.

    Args:
        conversations: read once, in order.
        chat: the format.
        context_length: of the model, in tokens.
        truncation: for conversations that do not fit. "drop": leave them out; "turns": leave out the oldest exchanges,
            keeping a system message, and drop those whose last exchange alone is too long; "end": cut ids off the end,
            so that the last answer has no end, and drop those in which no target is left.
        loss_on: as in `encode_conversation`.

    Raises:
        ValueError: an unknown option, a context length below 1, a message that the format refuses (with the number of
            its conversation), or no conversation is left.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation={truncation!r}: choose one of {', '.join(TRUNCATIONS)}")
    if context_length < 1:
        raise ValueError(f"context_length={context_length}: must be at least 1")
    counts = Counter(dict.fromkeys(("read", "kept", "shortened", "too_long", "without_answer"), 0))
    kept = []
    for number, messages in enumerate(conversations):
        counts["read"] += 1
        if not any(message.get("role") == "assistant" for message in messages):
            counts["without_answer"] += 1
            continue
        try:
            pair, was_cut = _fit(messages, chat, context_length + 1, truncation, loss_on)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
        counts["too_long" if pair is None else "kept"] += 1
        counts["shortened"] += was_cut and pair is not None
        if pair is not None:
            kept.append(pair)
    if not kept:
        raise ValueError(f"no conversation is left of {counts['read']}: {dict(counts)}")
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in kept])
    learned = np.concatenate([np.asarray(mask, bool) for _, mask in kept])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in kept)])
    return InstructionSet(tokens, learned, offsets, chat.pad_id, dict(counts))


def _fit(
    messages: Messages, chat: ChatFormat, room: int, truncation: str, loss_on: str
) -> tuple[tuple[list[int], list[bool]] | None, bool]:
    """The conversation's ids and mask in at most `room` ids, or None; and whether something was cut."""
    ids, mask = encode_conversation(messages, chat, loss_on)
    was_cut = False
    while len(ids) > room and truncation == "turns":
        shorter = _without_oldest_exchange(messages)
        if shorter is None:
            return None, False
        messages, was_cut = shorter, True
        ids, mask = encode_conversation(messages, chat, loss_on)
    if len(ids) > room and truncation == "end":
        ids, mask, was_cut = ids[:room], mask[:room], True
    return ((ids, mask) if len(ids) <= room and any(mask[1:]) else None), was_cut


def _without_oldest_exchange(messages: Messages) -> Messages | None:
    """All but what lies between the system message and the second question; None if no answer is left."""
    first = 1 if messages[0]["role"] == "system" else 0
    questions = [i for i, message in enumerate(messages) if message["role"] == "user" and i > first]
    if not questions or not any(message["role"] == "assistant" for message in messages[questions[0] :]):
        return None
    return [*messages[:first], *messages[questions[0] :]]


class InstructionBatches(EpochBatches):
    """Batches of conversations: padded, one a row, or packed, several a row.

    Padded: {"tokens", "targets"}, both (B, T) int64, T the longest row's length rounded up to a multiple of 16.
    Padding stands on the right, where under the causal mask nothing sees it.

    Packed: T is `context_length`; rows are filled once, by best-fit decreasing, and shuffled in every epoch. There is
    also "documents" (B, T) int64, the number of the conversation in its row, -1 for padding: `DocumentMask` makes of it
    the mask under which no conversation sees its neighbors. `apart=False` leaves "documents" out, and later
    conversations of a row then read the earlier ones: cross-contamination, for comparison.
    """

    def __init__(
        self,
        data: InstructionSet,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        packed: bool = False,
        apart: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the source, at position 0.

        Args:
            data: the conversations; not copied.
            batch_size: rows that each process gets, B.
            context_length: largest width of a row, T.
            seed: at least 0; with the epoch's number it fixes that epoch's order.
            packed: several conversations a row.
            apart: with `packed`, keep the conversations of a row from seeing one another.
            rank: this process, from 0.
            world_size: number of processes that share each global batch.

        Raises:
            ValueError: a conversation does not fit a row, `apart=False` without `packed`, or what `EpochBatches`
                refuses.
        """
        needed = data.lengths - 1  # slots: the last id is only a target
        if needed.max() > context_length:
            raise ValueError(
                f"a conversation needs {needed.max()} slots of context_length={context_length}: encode with a smaller "
                "one"
            )
        if not (apart or packed):
            raise ValueError("apart=False needs packed=True: rows that are not packed hold one conversation")
        self.data, self.context_length, self.packed, self.apart = data, context_length, packed, apart
        self.contents = pack(needed, context_length) if packed else [[i] for i in range(len(data))]
        lengths = np.array([needed[row].sum() for row in self.contents])
        super().__init__(lengths, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    @property
    def fill(self) -> float:
        """Share of the slots of an epoch's rows, as wide as `context_length`, that hold a conversation."""
        return float(self.row_lengths.sum() / (len(self.row_lengths) * self.context_length))

    def collate(self, rows: np.ndarray) -> Batch:
        """Tensors of the rows of these numbers."""
        width = self.context_length if self.packed else self._padded_width(rows)
        shape = (len(rows), width)
        tokens, targets = np.full(shape, self.data.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.full(shape, -1, np.int64)
        for b, row in enumerate(rows):
            slot = 0
            for number, index in enumerate(self.contents[row]):
                inputs, outputs = self.data.row(index)
                part = slice(slot, slot + len(inputs))
                tokens[b, part], targets[b, part], documents[b, part] = inputs, outputs, number
                slot += len(inputs)
        columns = {"tokens": tokens, "targets": targets}
        if self.packed and self.apart:
            columns["documents"] = documents
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _padded_width(self, rows: np.ndarray) -> int:
        return padded_width(int(self.row_lengths[rows].max()), self.context_length)

    def identity(self) -> dict[str, Any]:
        """What a position is a position in."""
        return super().identity() | {"packed": self.packed, "checksum": self.data.checksum}


def padded_width(longest: int, context_length: int) -> int:
    """`longest` rounded up to a multiple of `PAD_MULTIPLE`, at most `context_length`."""
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, context_length)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which examples share a row: best-fit decreasing, the longest first, each into the fullest row with room for it.

    Rows need at most 11/9 of the fewest possible, plus four (Johnson et al., 1974, for first-fit and best-fit alike).

    Args:
        lengths: (M,) slots of each example.
        capacity: slots of a row.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an example of {lengths.max()} slots does not fit a row of {capacity}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # slots left -> rows
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        room = next((left for left in range(length, capacity + 1) if with_room[left]), None)
        if room is None:
            rows.append([])
            with_room[capacity].append(len(rows) - 1)
            room = capacity
        row = with_room[room].pop()
        rows[row].append(index)
        with_room[room - length].append(row)
    return rows
