"""The reference model of preference learning, needed once: its log-probabilities are computed before training and
stored.

The reference does not change, so neither do the log-probabilities of the data under it. After one pass over the pairs
they are two numbers a pair, the second model leaves memory, and every training step saves its forward pass.

Shapes: N pairs in all, B pairs of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse import runtime
from llmcourse.alignment.log_probs import response_log_probs, trim
from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.packing import IGNORE

PAIR = ("chosen", "rejected")
MISMATCHED = "mismatched"


def joined(batch: Batch, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The rows of several names below one another, for one forward pass: tokens and targets (len(names) B, T) int64.

    batch holds "{name}_tokens" and "{name}_targets", both (B, T of that name); shorter ones are padded, and columns
    behind the last target are cut.

    Raises:
        ValueError: the batch lacks a name.
    """
    missing = [
        f"{name}_{part}" for name in names for part in ("tokens", "targets") if f"{name}_{part}" not in batch
    ]
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}: it has {', '.join(batch)}")
    width = max(batch[f"{name}_tokens"].shape[1] for name in names)

    def stacked(part: str, fill: int) -> Tensor:
        rows = [batch[f"{name}_{part}"] for name in names]
        return torch.cat([F.pad(row, (0, width - row.shape[1]), value=fill) for row in rows])

    return trim(stacked("tokens", 0), stacked("targets", IGNORE))


@torch.no_grad()
def reference_log_probs(
    model: nn.Module,
    batches: EpochBatches,
    names: Sequence[str] = PAIR,
    *,
    batch_size: int = 64,
    precision: str = "auto",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Log-probabilities of all responses under a model, summed over tokens: "{name}_ref_log_probs", (N,) float32 on the
    CPU.

    Pairs of like length run together, whatever the order of the batches.

    Args:
        model: the reference; put into evaluation mode meanwhile.
        batches: pairs; `collate` gives "{name}_tokens" and "{name}_targets".
        names: which rows of a pair.
        batch_size: pairs of one forward pass.
        precision: as in `FitSettings`; the one of training, so that a policy equal to the reference starts at ln 2.
        progress: show a bar.

    Raises:
        ValueError: a batch size below 1, a response without a token, or a log-probability that is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    device = next(model.parameters()).device
    dtype = runtime.precision_dtype(precision, device)
    was_training = model.training
    model.eval()
    n = len(batches.row_lengths)
    found = torch.zeros(len(names), n)
    order = np.argsort(batches.row_lengths, kind="stable")
    with (
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
        runtime.progress(total=n, description="reference", unit="pair", enabled=progress) as bar,
    ):
        for start in range(0, n, batch_size):
            rows = order[start : start + batch_size]
            tokens, targets = joined(batches.collate(rows), names)
            _check_responses(targets, rows)
            log_probs = response_log_probs(model, tokens.to(device), targets.to(device)).sum(dim=-1)
            found[:, rows] = log_probs.view(len(names), len(rows)).cpu()
            bar.update(len(rows))
    model.train(was_training)
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).any(dim=0).nonzero()[0])
        raise ValueError(
            f"pair {row} has a log-probability of {found[:, row].tolist()} under the reference: look at its weights"
        )
    return {f"{name}_ref_log_probs": column for name, column in zip(names, found, strict=True)}


def mismatched_rows(
    tokens: Tensor, targets: Tensor, other_targets: Tensor, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts of some rows with the responses of others, as KTO's reference point asks for.

    Args:
        tokens: (B, T) int64, prompts and responses.
        targets: (B, T) int64, -100 outside the responses.
        other_targets: (B, T') int64, those of the rows whose responses are wanted.
        limit: longest row; what goes beyond it is cut off the response.

    Returns:
        tokens and targets (B, T'') int64.
    """
    rows = []
    for row in range(len(tokens)):
        n_prompt = (
            int((targets[row] != IGNORE).int().argmax()) + 1
        )  # the last prompt token has the first target
        response = other_targets[row][other_targets[row] != IGNORE]
        new_tokens = torch.cat((tokens[row, :n_prompt], response[:-1]))
        new_targets = torch.cat((torch.full((n_prompt - 1,), IGNORE), response))
        rows.append((new_tokens[:limit], new_targets[:limit]))
    width = max(len(new_tokens) for new_tokens, _ in rows)
    return (
        torch.stack([F.pad(new_tokens, (0, width - len(new_tokens))) for new_tokens, _ in rows]),
        torch.stack(
            [F.pad(new_targets, (0, width - len(new_targets)), value=IGNORE) for _, new_targets in rows]
        ),
    )


class MismatchedBatches(EpochBatches):
    """Batches of pairs with a third row, "mismatched": the pair's prompt with a response of the next pair of the data.

    The response is the next pair's chosen one in even pairs and its rejected one in odd pairs, so that both kinds are
    seen.
    """

    def __init__(self, source: EpochBatches, *, limit: int | None = None) -> None:
        """Make the source, at position 0.

        Args:
            source: batches of pairs; its seed, batch size and place in the world are taken over.
            limit: longest row in tokens, the model's context.

        Raises:
            ValueError: fewer than 2 pairs.
        """
        if len(source.row_lengths) < 2:
            raise ValueError(f"{len(source.row_lengths)} pair: a response of another prompt needs at least 2")
        self.source, self.limit = source, limit
        _same_place(self, source)

    def collate(self, rows: np.ndarray) -> Batch:
        """The source's tensors, "mismatched_tokens" and "mismatched_targets", both (B, T) int64."""
        batch = self.source.collate(rows)
        others = self.source.collate((rows + 1) % len(self.row_lengths))
        _, responses = joined(others, PAIR)
        picked = torch.from_numpy(np.arange(len(rows)) + len(rows) * (rows % 2))
        tokens, targets = mismatched_rows(
            batch["chosen_tokens"], batch["chosen_targets"], responses[picked], self.limit
        )
        return batch | {f"{MISMATCHED}_tokens": tokens, f"{MISMATCHED}_targets": targets}

    def identity(self) -> dict[str, object]:
        """What a position is a position in."""
        return self.source.identity()


class ReferenceBatches(EpochBatches):
    """Batches of pairs with their stored numbers, such as log-probabilities under the reference."""

    def __init__(self, source: EpochBatches, columns: dict[str, Tensor]) -> None:
        """Make the source, at position 0.

        Args:
            source: batches of pairs; its seed, batch size and place in the world are taken over.
            columns: numbers (N,) of each pair by name, see `reference_log_probs`.

        Raises:
            ValueError: a column is not as long as the data.
        """
        for name, column in columns.items():
            if len(column) != len(source.row_lengths):
                raise ValueError(
                    f"{name} has {len(column)} values for {len(source.row_lengths)} pairs: store one of each"
                )
        self.source, self.columns = source, columns
        _same_place(self, source)

    def collate(self, rows: np.ndarray) -> Batch:
        """The source's tensors, and the numbers (B,) of these pairs."""
        return self.source.collate(rows) | {name: column[rows] for name, column in self.columns.items()}

    def identity(self) -> dict[str, object]:
        """What a position is a position in; another reference is another run."""
        means = {f"mean_{name}": round(float(column.mean()), 2) for name, column in self.columns.items()}
        return self.source.identity() | means


def _same_place(batches: EpochBatches, source: EpochBatches) -> None:
    EpochBatches.__init__(
        batches,
        source.row_lengths,
        batch_size=source.batch_size,
        seed=source.seed,
        rank=source.rank,
        world_size=source.world_size,
    )


def _check_responses(targets: Tensor, rows: np.ndarray) -> None:
    empty = (targets == IGNORE).all(dim=-1).nonzero().flatten()
    if len(empty):
        raise ValueError(
            f"pair {rows[int(empty[0]) % len(rows)]} has a response without a token: leave such pairs out of the data"
        )
