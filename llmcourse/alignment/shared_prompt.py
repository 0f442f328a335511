"""Several answers in one row: their prompt goes through the model once, all attend to it and not to one another.

Two rows a pair read the prompt twice. With a prompt of P tokens and answers of C and R, one row has P + C + R positions
in place of 2 P + C + R, and gives the same log-probabilities and gradients. For a group of N responses to one prompt,
as in GRPO, one row saves N - 1 prompts; the attention of a row grows with the square of its length, though.

Shapes: B pairs or responses, T slots of a row, G groups, N responses of a group, S slots of a group's row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llmcourse import runtime
from llmcourse.alignment.log_probs import response_log_probs
from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.packing import IGNORE

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1


def sharing_pays(precision: str, device: torch.device) -> bool:
    """Whether pairs with a shared prompt train faster than two rows a pair: in float32.

    In bfloat16 the fast attention kernels are those for plain causal rows; the mask that shared rows need rules them
    out, which costs more than the positions save. `precision` as in `FitSettings`.
    """
    return runtime.precision_dtype(precision, device) is None


class SharedPrompt:
    """Passed as a model's `cache`: every slot sees the earlier slots of its prompt and of its own answer.

    Nothing is stored between calls.

    Args:
        segments: (B, T) int64, what each slot belongs to: 0 prompt, from 1 on the answers (of a pair: 1 chosen, 2
            rejected), -1 padding.
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
                    f"pair {number} has two prompts: a shared prompt needs one, set share_prompt=False"
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


def group_log_probs(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    group_size: int,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`response_log_probs` of rows that come in groups with one prompt each, which is read once for the group.

    Args:
        model: as there, and with `hidden_states`.
        tokens: (B, T) int64; rows n N to (n + 1) N belong to group n.
        targets: (B, T) int64, -100 outside the responses; a row may have none.
        group_size: N.
        temperature: divides the logits.
        chunk_size: as there.

    Returns:
        (B, T) float32, 0 where there is no target.

    Raises:
        ValueError: B is no multiple of the group size, or the rows of a group have different prompts.
    """
    if len(tokens) % group_size:
        raise ValueError(f"{len(tokens)} rows do not divide into groups of {group_size}: give whole groups")
    groups = zip(tokens.split(group_size), targets.split(group_size), strict=True)
    found = [_group_row(*group, number) for number, group in enumerate(groups)]
    fills = (0, IGNORE, PADDING, 0)
    shared_tokens, shared_targets, segments, places = (
        pad_sequence(list(parts), batch_first=True, padding_value=fill)
        for parts, fill in zip(zip(*found, strict=True), fills, strict=True)
    )  # (G, S) each
    log_probs = response_log_probs(
        model, shared_tokens, shared_targets,
        temperature=temperature, chunk_size=chunk_size, cache=SharedPrompt(segments, places),
    )  # fmt: skip
    # the targets follow one another in the same order here and there
    values = log_probs[shared_targets != IGNORE]
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(targets != IGNORE, values)


def _group_row(tokens: Tensor, targets: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, targets, segments and places, (slots,) each, of a group's rows (N, T) in one."""
    written = targets != IGNORE  # (N, T)
    kept = written.any(dim=1)
    if not bool(kept.any()):
        return tokens[0, :1], targets[0, :1], torch.zeros_like(tokens[0, :1]), torch.zeros_like(tokens[0, :1])
    tokens, targets, written = tokens[kept], targets[kept], written[kept]
    start = int(written[0].int().argmax())
    same = (tokens[:, : start + 1] == tokens[0, : start + 1]).all() and written[:, start].all()
    if not bool(same) or bool(written[:, :start].any()):
        raise ValueError(f"group {number} has several prompts: give rows in whole groups, or do not share")
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    used = (slots >= start) & (written.flip(1).cumsum(dim=1).flip(1) > 0)  # up to each row's last target
    answers = torch.arange(1, len(tokens) + 1, device=tokens.device)[:, None].expand_as(tokens)
    prompt = tokens[0, :start]
    return (
        torch.cat((prompt, tokens[used])),
        torch.cat((torch.full_like(prompt, IGNORE), targets[used])),
        torch.cat((torch.full_like(prompt, PROMPT), answers[used])),
        torch.cat((slots[:start], slots.expand_as(tokens)[used])),
    )
