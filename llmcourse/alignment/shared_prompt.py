"""A pair in one row: the prompt goes through the model once, both answers attend to it and not to each other.

Two rows a pair read the prompt twice. With a prompt of P tokens and answers of C and R, one row has P + C + R positions
in place of 2 P + C + R, and gives the same log-probabilities and gradients.

Shapes: B pairs, T slots of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.packing import IGNORE

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1


class SharedPrompt:
    """Passed as a model's `cache`: every slot sees the earlier slots of its prompt and of its own answer.

    Nothing is stored between calls.

    Args:
        segments: (B, T) int64, what each slot belongs to: 0 prompt, 1 chosen, 2 rejected, -1 padding.
        places: (B, T) int64, positions of the slots within prompt and answer.
    """

    length = 0

    def __init__(self, segments: Tensor, places: Tensor) -> None:
        self.segments, self.places = segments, places
        # The model asks whether `longest` plus the slots fit its context; what has to fit is the last position.
        self.longest = int(places.max()) + 1 - places.shape[1]

    def positions(self, n_tokens: int) -> Tensor:
        """The places, (B, T) int64."""
        return self.places

    def mask(self, n_tokens: int) -> Tensor:
        """Boolean (B, 1, T, T): True where the key is not later than the query, and of the prompt or of one segment."""
        keys, queries = self.segments[:, None, :], self.segments[:, :, None]
        return ((keys == PROMPT) | (keys == queries)).tril()[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, K, T, C) as they are: there is no past to add."""
        return keys, values

    def advance(self, n_tokens: int) -> None:
        """Nothing is stored, so nothing is counted."""


class SharedPromptBatches(EpochBatches):
    """Batches of pairs with "shared_tokens", "shared_targets", "shared_segments", "shared_places", all (B, T) int64.

    The last token of the prompt stands in both answers' segments, since it predicts the first token of each.
    """

    def __init__(self, source: EpochBatches) -> None:
        """Make the source, at position 0; seed, batch size and place in the world are taken over."""
        self.source = source
        super().__init__(
            source.row_lengths,
            batch_size=source.batch_size,
            seed=source.seed,
            rank=source.rank,
            world_size=source.world_size,
        )

    def collate(self, rows: np.ndarray) -> Batch:
        """The source's tensors and the shared rows.

        Raises:
            ValueError: the two rows of a pair have different prompts.
        """
        batch = self.source.collate(rows)
        found: dict[str, list[Tensor]] = {"tokens": [], "targets": [], "segments": [], "places": []}
        for b, number in enumerate(rows):
            sides = [_answer(batch, side, b) for side in ("chosen", "rejected")]
            (start, tokens, _), (other_start, other_tokens, _) = sides
            prompt = tokens[:start]
            if start != other_start or not torch.equal(tokens[: start + 1], other_tokens[: start + 1]):
                raise ValueError(
                    f"pair {number} has two prompts: a shared prompt needs one, leave share_prompt out"
                )
            parts = [(prompt, torch.full_like(prompt, IGNORE), PROMPT, 0)]
            for segment, (_, ids, targets) in zip((CHOSEN, REJECTED), sides, strict=True):
                parts.append((ids[start:], targets[start:], segment, start))
            found["tokens"].append(torch.cat([ids for ids, *_ in parts]))
            found["targets"].append(torch.cat([targets for _, targets, *_ in parts]))
            found["segments"].append(
                torch.cat([torch.full_like(ids, segment) for ids, _, segment, _ in parts])
            )
            found["places"].append(torch.cat([torch.arange(len(ids)) + first for ids, *_, first in parts]))
        fills = {"tokens": 0, "targets": IGNORE, "segments": PADDING, "places": 0}
        return batch | {
            f"shared_{name}": pad_sequence(parts, batch_first=True, padding_value=fills[name])
            for name, parts in found.items()
        }

    def identity(self) -> dict[str, object]:
        """What a position is a position in."""
        return self.source.identity()


def _answer(batch: Batch, side: str, row: int) -> tuple[int, Tensor, Tensor]:
    """Where the first target of a row stands, and its tokens and targets up to the last one."""
    targets = batch[f"{side}_targets"][row]
    with_target = (targets != IGNORE).nonzero().flatten()
    start, end = int(with_target[0]), int(with_target[-1]) + 1
    return start, batch[f"{side}_tokens"][row, :end], targets[:end]
