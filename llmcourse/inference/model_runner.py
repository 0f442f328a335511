"""The engine's forward pass: the fused model where that is possible, the model itself elsewhere.

Shapes: B rows, T new tokens, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.inference.fused import FusedTransformer, can_fuse
from llmcourse.models.transformer import Transformer


class ModelRunner:
    """Logits of a model with any cache.

    It holds a copy of the weights where the model can be fused, and does not follow later changes of the model then.
    """

    def __init__(self, model: Transformer, *, fused: bool = True) -> None:
        self.model, self.config = model, model.config
        self.fast = FusedTransformer(model) if fused and can_fuse(model) else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys and values."""
        return self.model.embedding.weight.dtype

    @property
    def takes_flat_rows(self) -> bool:
        """Whether it can compute rows of different lengths one behind the other, see `FlatView`."""
        return self.fast is not None

    def all_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """tokens (B, T) int64, new ones only -> logits (B, T, V) after each of them."""
        if self.fast is not None:
            return self.fast.unembed(self.fast.hidden(tokens, cache))
        return self.model(tokens, cache)

    def flat_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """tokens (N,) of all rows one behind the other, with a `FlatView` -> logits (rows, V) after each row's last."""
        return self.fast.unembed(self.fast.hidden(tokens[None], cache)[0, cache.last])

    def logits(self, tokens: Tensor, cache: Any, last: Tensor) -> Tensor:
        """tokens (B, T), last (B,) int64 -> logits (B, V) after the token in place `last` of each row."""
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.fast is not None:
            return self.fast.unembed(self.fast.hidden(tokens, cache)[rows, last])
        return self.model.head(self.model.hidden_states(tokens, cache)[rows, last])
