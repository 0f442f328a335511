"""How well a model predicts text: nats per token, perplexity, bits per byte. Shapes: B rows, T tokens, V vocab_size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.data.packing import IGNORE


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Summed code length of a text under a model."""

    total_nats: float
    """sum of -ln p over all target tokens"""
    n_tokens: int
    """number of target tokens"""
    standard_error: float
    """of `nats_per_token`, from the spread between rows"""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy in nats."""
        return self.total_nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per UTF-8 byte of the text that was predicted: comparable between tokenizers and with compressors."""
        return self.total_nats / math.log(2) / n_bytes


def token_losses(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target, (B, T) float32; 0 where the target is -100. tokens and targets (B, T) int64."""
    logits = model(tokens)  # (B, T, V)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view_as(targets)


@torch.no_grad()
def token_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> TokenLoss:
    """Loss over batches of {"tokens", "targets"}, in the weights' own precision.

    Raises:
        ValueError: no target in any batch.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums, counts = [], []
    for batch in batches:
        targets = batch["targets"].to(device)
        sums.append(token_losses(model, batch["tokens"].to(device), targets).double().sum(dim=1).cpu())
        counts.append((targets != IGNORE).sum(dim=1).cpu())
    model.train(was_training)
    if not counts or int(torch.cat(counts).sum()) == 0:
        raise ValueError("no target token to evaluate on: the validation set is empty")
    total, count = torch.cat(sums), torch.cat(counts)  # (rows,)
    mean = float(total.sum() / count.sum())
    residual = total - mean * count  # ratio estimator: rows are the independent units
    error = float(residual.pow(2).sum().sqrt() / count.sum())
    return TokenLoss(total_nats=float(total.sum()), n_tokens=int(count.sum()), standard_error=error)
