"""Log-probabilities of responses: what every alignment loss is made of.

The logits are the largest tensor of a training step, and a loss on responses needs them only at the positions whose
next token belongs to a response. So these functions pick those positions first and apply the softmax to them alone; the
feed-forward layer of the last block, which nothing but the head reads, runs there alone too.

Shapes: B rows, T positions, V vocab_size, D d_model, M positions of the batch that have a target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmcourse.data.packing import IGNORE
from llmcourse.models.attention import Cache
from llmcourse.models.transformer import Block, Transformer


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """ln p of each target: logits (B, T, V), targets (B, T) int64 -> (B, T) float32, 0 where the target is -100.

    Only the M x V logits that have a target are copied to float32.

    Raises:
        ValueError: logits and targets are of different rows or lengths.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in their first axes: give each "
            "position its target"
        )
    mask = targets != IGNORE  # (B, T)
    return _spread(_log_probs(logits[mask], targets[mask]), mask)


def response_log_probs(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """ln p of each target under a model: tokens and targets (B, T) int64 -> (B, T) float32, 0 where there is none.

    targets are the tokens one place later where these belong to a response, and -100 elsewhere. A model with
    `hidden_states` and `head` (ours) applies its head to the M target positions only, so that no (B, T, V) tensor is
    ever made; of any other model the logits are taken.

    Args:
        model: called with tokens (B, T), gives logits (B, T, V).
        tokens: prompts and responses, padded at their ends.
        targets: see above.
        temperature: divides the logits.
        chunk_size: positions that go through the head at a time. The backward pass then computes each chunk's
            logits again, so that only chunk_size x V of them are alive at once, for the price of one more product
            with the head. `None` takes all M together.
        cache: passed on to the model, for rows with their own positions and mask; see `SharedPrompt`.

    Raises:
        ValueError: tokens and targets differ in shape, or a chunk size below 1.
    """
    if tokens.shape != targets.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} must have one shape (B, T)"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: give at least 1, or None for all positions together")
    if not (hasattr(model, "hidden_states") and hasattr(model, "head")):
        logits = model(tokens) if cache is None else model(tokens, cache)
        return token_log_probs(logits / temperature, targets)
    mask = targets != IGNORE  # (B, T)
    hidden, chosen = hidden_at(model, tokens, mask, cache), targets[mask]  # (M, D), (M,)

    def through_head(part: Tensor, part_targets: Tensor) -> Tensor:
        logits = model.head(part)
        return _log_probs(logits if temperature == 1 else logits / temperature, part_targets)

    if chunk_size is None:
        return _spread(through_head(hidden, chosen), mask)
    parts = [
        checkpoint(through_head, part, part_targets, use_reentrant=False)
        for part, part_targets in zip(hidden.split(chunk_size), chosen.split(chunk_size), strict=True)
    ]
    return _spread(torch.cat(parts), mask)


def hidden_at(model: nn.Module, tokens: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
    """`model.hidden_states(tokens, cache)[mask]` with less work: tokens (B, T) int64, mask (B, T) bool -> (M, D).

    Only attention mixes positions. Behind that of the last block, the rest is computed for the M positions alone. A
    block that something else watches or replaces runs as a whole.
    """
    watched = not isinstance(model, Transformer) or _is_watched(model.blocks[-1])
    n_before = 0 if cache is None else cache.longest
    if (
        watched or n_before + tokens.shape[1] > model.config.context_length
    ):  # which the model refuses in its words
        return model.hidden_states(tokens, cache)[mask]
    cos, sin = model.rope(tokens.shape[1], cache)
    attended = None if cache is None else cache.mask(tokens.shape[1])
    x = model.embedding(tokens)  # (B, T, D)
    *blocks, last = model.blocks
    for layer, block in enumerate(blocks):
        x = block(x, cos, sin, cache, layer, attended)
    x = x + last.attention(last.attention_norm(x), cos, sin, cache, len(blocks), attended)
    x = x[mask]  # (M, D)
    if cache is not None:
        cache.advance(tokens.shape[1])
    return model.final_norm(x + last.mlp(last.mlp_norm(x)))


def _is_watched(block: nn.Module) -> bool:
    hooks = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    return type(block) is not Block or any(hooks)


def response_lengths(targets: Tensor) -> Tensor:
    """Tokens of each response: targets (B, T) int64, -100 outside the response -> (B,) int64."""
    return (targets != IGNORE).sum(dim=-1)


def trim(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the columns after the batch's last target: (B, T) -> (B, T') both.

    In a causal model no target sees them, so that no log-probability changes. At least one column stays.
    """
    columns = (targets != IGNORE).any(dim=0).nonzero()
    end = int(columns[-1]) + 1 if len(columns) else 1
    return tokens[:, :end], targets[:, :end]


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (M, V), targets (M,) -> (M,) float32."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """values (M,) to the True places of mask (B, T), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
