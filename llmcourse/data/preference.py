"""Pairs of answers, one of them preferred, as training data for preference optimization and reward models.

Legend: B pairs of a batch, T slots of a row, M pairs.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llmcourse.data import town_words as words
from llmcourse.data.chat_formats import ChatFormat
from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.instruction import padded_width
from llmcourse.data.packing import IGNORE
from llmcourse.data.town_choices import stream
from llmcourse.data.town_instructions import TownInstruction, TownInstructions
from llmcourse.data.town_rewards import prefer

_PAIRS = 111  # purpose of the random stream


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one conversation, and which of them somebody prefers."""

    messages: tuple[Mapping[str, str], ...]
    """the conversation up to the answer; the last message is the user's"""
    chosen: str
    """the preferred answer"""
    rejected: str
    """the other one"""
    margin: float | None = None
    """true reward of the chosen minus that of the rejected answer, where it is known; negative: a mistake"""

    @property
    def row(self) -> dict[str, Any]:
        """The pair in the conversational format of `trl`: "prompt", "chosen" and "rejected", lists of messages."""
        return {
            "prompt": [dict(message) for message in self.messages],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


@dataclass(frozen=True, eq=False)
class PreferenceSet:
    """Encoded pairs, and what became of those that were read."""

    prompts: list[np.ndarray]
    """M arrays of int64 ids, up to where the answer begins"""
    chosen: list[np.ndarray]
    """M arrays of int64 ids of the preferred answers, the end of the turn included"""
    rejected: list[np.ndarray]
    """the same for the other answers"""
    margins: np.ndarray
    """(M,) float32 differences of true reward; NaN where unknown"""
    pad_id: int
    """fills rows of a batch"""
    counts: Mapping[str, int]
    """pairs read, kept, identical (chosen equals rejected, dropped), too_long (dropped) and mistakes (kept)"""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """(M,) int64 slots of the longer of the two rows; the last id is only a target."""
        answers = [max(len(a), len(b)) for a, b in zip(self.chosen, self.rejected, strict=True)]
        return np.array([len(p) + n - 1 for p, n in zip(self.prompts, answers, strict=True)])

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all ids and borders."""
        crc = 0
        for part in (*self.prompts, *self.chosen, *self.rejected):
            crc = zlib.crc32(part.tobytes(), zlib.crc32(str(len(part)).encode(), crc))
        return crc


def encode_pairs(pairs: Iterable[PreferencePair], chat: ChatFormat, *, context_length: int) -> PreferenceSet:
    """Encode pairs; those that do not fit or hold no preference are counted in the result's `counts`.

    Nothing is cut: an answer without its end would be judged for what it is not.

    Args:
        pairs: read once, in order.
        chat: the format.
        context_length: of the model, in tokens.

    Raises:
        ValueError: a message that the format refuses (with the number of its pair), a format whose prompt is no prefix
            of the conversation, a context length below 1, or no pair is left.
    """
    if context_length < 1:
        raise ValueError(f"context_length={context_length}: must be at least 1")
    counts = Counter(dict.fromkeys(("read", "kept", "identical", "too_long", "mistakes"), 0))
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    margins = []
    for number, pair in enumerate(pairs):
        counts["read"] += 1
        if pair.chosen == pair.rejected:
            counts["identical"] += 1
            continue
        try:
            prompt, chosen, rejected = _encode_pair(pair, chat)
        except ValueError as error:
            raise ValueError(f"pair {number}: {error}") from None
        if len(prompt) + max(len(chosen), len(rejected)) - 1 > context_length:
            counts["too_long"] += 1
            continue
        counts["kept"] += 1
        counts["mistakes"] += pair.margin is not None and pair.margin < 0
        kept.append((prompt, chosen, rejected))
        margins.append(np.nan if pair.margin is None else pair.margin)
    if not kept:
        raise ValueError(f"no pair is left of {counts['read']}: {dict(counts)}")
    prompts, chosen_ids, rejected_ids = (list(part) for part in zip(*kept, strict=True))
    margins = np.array(margins, np.float32)
    return PreferenceSet(prompts, chosen_ids, rejected_ids, margins, chat.pad_id, dict(counts))


def _encode_pair(pair: PreferencePair, chat: ChatFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the prompt and of what each answer adds to it."""
    prompt = chat.prompt(pair.messages)
    parts = [np.array(prompt, np.int64)]
    for answer in (pair.chosen, pair.rejected):
        ids, _ = chat.encode([*pair.messages, {"role": "assistant", "content": answer}])
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                "the chat template writes the prompt differently once there is an answer: use another"
            )
        parts.append(np.array(ids[len(prompt) :], np.int64))
    return parts[0], parts[1], parts[2]


class PreferenceBatches(EpochBatches):
    """Batches of pairs, padded on the right to one width T, so that both sides can go through one forward pass.

    Each is {"chosen_tokens", "chosen_targets", "rejected_tokens", "rejected_targets"}, all (B, T) int64, targets -100
    outside the answer; "pairs" (B,) int64, the numbers of the pairs in the data, by which numbers that are computed
    once for a pair can be looked up; and "margins" (B,) float32, differences of true reward, NaN where unknown.
    """

    def __init__(
        self,
        data: PreferenceSet,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the source, at position 0.

        Args:
            data: the pairs; not copied.
            batch_size: pairs that each process gets, B.
            context_length: largest width of a row.
            seed: at least 0; with the epoch's number it fixes that epoch's order.
            rank: this process, from 0.
            world_size: number of processes that share each global batch.

        Raises:
            ValueError: a pair does not fit a row, or what `EpochBatches` refuses.
        """
        lengths = data.lengths
        if lengths.max() > context_length:
            raise ValueError(
                f"a pair needs {lengths.max()} slots of context_length={context_length}: encode with a smaller one"
            )
        self.data, self.context_length = data, context_length
        super().__init__(lengths, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def collate(self, rows: np.ndarray) -> Batch:
        """Tensors of the pairs of these numbers."""
        width = padded_width(int(self.row_lengths[rows].max()), self.context_length)
        batch: Batch = {}
        for side in ("chosen", "rejected"):
            answers = getattr(self.data, side)
            tokens = np.full((len(rows), width), self.data.pad_id, np.int64)
            targets = np.full((len(rows), width), IGNORE, np.int64)
            for b, row in enumerate(rows):
                prompt, answer = self.data.prompts[row], answers[row]
                end = len(prompt) + len(answer) - 1
                tokens[b, :end] = np.concatenate([prompt, answer[:-1]])
                targets[b, len(prompt) - 1 : end] = answer
            batch |= {
                f"{side}_tokens": torch.from_numpy(tokens),
                f"{side}_targets": torch.from_numpy(targets),
            }
        numbers = torch.from_numpy(rows.astype(np.int64))
        return batch | {"pairs": numbers, "margins": torch.from_numpy(self.data.margins[rows])}

    def identity(self) -> dict[str, Any]:
        """What a position is a position in."""
        return super().identity() | {"checksum": self.data.checksum}


# Pairs whose true reward is known -----------------------------------------------------------------------------


def annotate(
    instructions: Sequence[TownInstruction],
    a: Sequence[str],
    b: Sequence[str],
    reward: Callable[[TownInstruction, str], float],
    *,
    noise: float,
    seed: int = 0,
) -> list[PreferencePair]:
    """Let an annotator choose between two answers to each request, by a reward that later methods do not see.

    Args:
        instructions: the requests.
        a: an answer to each.
        b: another answer to each.
        reward: the true reward, for example `TownInstructions.reward`.
        noise: of the annotator, in units of reward; see `town_rewards.prefer` (Bradley and Terry, 1952).
        seed: of the annotator's mistakes.

    Raises:
        ValueError: lists of different lengths, or a negative noise or seed.
    """
    if not len(instructions) == len(a) == len(b):
        raise ValueError(f"{len(instructions)} requests, {len(a)} and {len(b)} answers: give one of each")
    rng = stream(_PAIRS, seed)
    pairs = []
    for instruction, first, second in zip(instructions, a, b, strict=True):
        choice = prefer(first, second, reward(instruction, first), reward(instruction, second), noise, rng)
        pairs.append(
            PreferencePair(
                messages=instruction.messages,
                chosen=choice.chosen,
                rejected=choice.rejected,
                margin=choice.margin,
            )
        )
    return pairs


def annotate_rankings(
    instructions: Sequence[TownInstruction],
    answers: Sequence[Sequence[str]],
    reward: Callable[[TownInstruction, str], float],
    *,
    noise: float,
    seed: int = 0,
) -> list[PreferencePair]:
    """Let an annotator rank several answers to each request; the first and the last of the ranking are the pair.

    The annotator sees each true reward with an error from a Gumbel distribution of scale `noise`, which is the ranking
    model of Plackett (1975): between any two answers it chooses as the Bradley-Terry annotator of `annotate` does.

    Args:
        instructions: the requests.
        answers: lists of answers, one answer to each request in each list.
        reward: the true reward, for example `TownInstructions.reward`.
        noise: of the annotator, in units of reward; 0 makes no mistakes and breaks ties at random.
        seed: of the annotator's mistakes.

    Raises:
        ValueError: fewer than two lists, lists of different lengths, or a negative noise or seed.
    """
    if len(answers) < 2 or any(len(one) != len(instructions) for one in answers):
        raise ValueError(
            f"{len(instructions)} requests, lists of {[len(one) for one in answers]} answers: give at least two "
            "lists with one answer to each request"
        )
    if noise < 0.0:
        raise ValueError(f"noise={noise}: use 0 for a perfect annotator or a positive number")
    rng = stream(_PAIRS, seed, 2)
    pairs = []
    for instruction, *candidates in zip(instructions, *answers, strict=True):
        rewards = [reward(instruction, answer) for answer in candidates]
        errors = [-math.log(-math.log(max(rng.random(), 1e-300))) for _ in candidates]
        seen = [
            (r + noise * e, e) for r, e in zip(rewards, errors, strict=True)
        ]  # e decides where noise is 0
        last, first = seen.index(min(seen)), seen.index(max(seen))
        pairs.append(
            PreferencePair(
                messages=instruction.messages,
                chosen=candidates[first],
                rejected=candidates[last],
                margin=rewards[first] - rewards[last],
            )
        )
    return pairs


def town_pairs(
    instructions: TownInstructions, n: int, *, noise: float = 0.0, seed: int = 0
) -> list[PreferencePair]:
    """Pairs without a model: n training requests, each with a right answer and one with a `mistake`, annotated.

    Raises:
        ValueError: a negative n, noise or seed.
    """
    requests = instructions.training(n, seed)
    rng = stream(_PAIRS, seed, 1)
    right = [request.answer for request in requests]
    wrong = [mistake(answer, rng) for answer in right]
    return annotate(requests, right, wrong, instructions.reward, noise=noise, seed=seed)


_POOLS = (*words.ATTRIBUTES.values(), words.OBJECTS, words.PLACES, words.MOODS)
_POOL_OF = {word: pool for pool in _POOLS for word in pool}


def mistake(answer: str, rng: random.Random) -> str:
    """The answer with one word that carries information, or one number, replaced by another of its kind.

    >>> mistake("Anna felt sad.", random.Random(0))
    'Anna felt proud.'

    An answer without such a word is returned as it is.
    """
    parts = re.split(r"([A-Za-z]+|[0-9]+)", answer)
    places = [i for i, part in enumerate(parts) if part in _POOL_OF or part.isdigit()]
    if not places:
        return answer
    place = places[int(rng.random() * len(places))]
    word = parts[place]
    pool = _POOL_OF.get(word) or [str(int(word) + step) for step in (-10, -1, 1, 10) if int(word) + step >= 0]
    others = [other for other in pool if other != word]
    parts[place] = others[int(rng.random() * len(others))]
    return "".join(parts)
