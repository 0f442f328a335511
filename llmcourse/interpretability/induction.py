"""Heads that continue repetitions: scores from attention patterns, and the proof by ablation.

On random tokens that are repeated, nothing but the repetition helps. An induction head attends from a token to the one
*behind* its earlier occurrence; it needs a head of an earlier layer that tells each token which one was before it
(Elhage et al., 2021; Olsson et al., 2022).

Shapes: B rows, L n_layers, H heads, T tokens, N tokens of the part that is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.interpretability.hooks import Hook, record, set_heads
from llmcourse.models.transformer import Transformer

Head = tuple[int, int]
"""(layer, head), both from 0"""


def repeated_tokens(
    vocab: Sequence[int], n_rows: int, length: int, *, first: int | None = None, seed: int = 0
) -> Tensor:
    """Random tokens of `vocab`, without repetition inside of a row, written twice: (n_rows, 2 length), or one more with
    a token `first` in front.

    Raises:
        ValueError: fewer tokens to choose from than a row needs.
    """
    if len(vocab) < length or length < 2 or n_rows < 1:
        raise ValueError(
            f"{len(vocab)} tokens for rows of {length}: give at least as many, and rows of at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(list(vocab))
    rows = torch.stack([ids[torch.randperm(len(ids), generator=generator)[:length]] for _ in range(n_rows)])
    twice = torch.cat((rows, rows), dim=1)
    return twice if first is None else torch.cat((torch.full((n_rows, 1), first), twice), dim=1)


@torch.no_grad()
def head_scores(model: Transformer, tokens: Tensor, length: int) -> dict[str, Tensor]:
    """Mean attention of every head, (L, H) each, on tokens of `repeated_tokens`.

    "previous": from each token to the one before it. "duplicate": from the second half to the same token's first
    occurrence. "induction": from the second half to the token behind the first occurrence. The last prediction of the
    second half, which has nothing to copy, does not count.
    """
    _, found = record(model, tokens, "blocks.*.pattern")
    pattern = torch.stack(list(found.values())).mean(dim=1)  # (L, H, T, T)
    start = tokens.shape[1] - length  # of the second half
    queries = torch.arange(start, tokens.shape[1] - 1)
    every = torch.arange(1, tokens.shape[1])
    return {
        "previous": pattern[:, :, every, every - 1].mean(dim=-1),
        "duplicate": pattern[:, :, queries, queries - length].mean(dim=-1),
        "induction": pattern[:, :, queries, queries - length + 1].mean(dim=-1),
    }


@torch.no_grad()
def half_losses(
    model: Transformer, tokens: Tensor, length: int, hooks: dict[str, Hook] | None = None
) -> tuple[float, float]:
    """Mean loss in nats per token of the first and of the second half, without the token where the second begins: a
    model with induction heads predicts the second half."""
    logits, _ = record(model, tokens, "logits", hooks)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(tokens), -1)  # loss t is that of token t + 1
    start = tokens.shape[1] - length
    return float(losses[:, : start - 1].mean()), float(losses[:, start:].mean())


def without_heads(heads: Sequence[Head], means: dict[str, Tensor] | None = None) -> dict[str, Hook]:
    """Hooks that remove heads: their outputs become zero or, with `means` of `mean_head_outputs`, what they are on
    average, which leaves the rest of the model in more familiar circumstances."""
    hooks: dict[str, Hook] = {}
    for layer in sorted({layer for layer, _ in heads}):
        name = f"blocks.{layer}.head_outputs"
        some = [head for other, head in heads if other == layer]
        hooks[name] = set_heads(some) if means is None else set_heads(some, means[name])
    return hooks


@torch.no_grad()
def mean_head_outputs(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Mean of every head's output over rows and positions, (H, C) for each layer's "head_outputs"."""
    _, found = record(model, tokens, "blocks.*.head_outputs")
    return {name: value.mean(dim=(0, 1)) for name, value in found.items()}
