"""From logits to the next token. Shapes: B rows, V vocab_size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    The filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    """divides the logits; 0 is greedy decoding"""
    top_k: int = 0
    """keep the k most likely tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al., 2020)"""
    min_p: float = 0.0
    """keep tokens at least this fraction as likely as the likeliest (Nguyen et al., 2024)"""
    max_new_tokens: int = 64
    """stop after this many"""
    stop: tuple[str, ...] = ()
    """stop when the new text holds one of these; it is cut off"""
    seed: int | None = None
    """of this call's random numbers; `None` draws from torch's global generator"""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # this way round it refuses NaN too
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a probability above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: give a fraction between 0 and 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r}: give a tuple of strings, ({self.stop!r},)")
        if "" in self.stop:
            raise ValueError(
                f"stop={self.stop!r}: every text holds the empty string; give strings with letters"
            )

    def with_seed_plus(self, offset: int) -> SamplingParams:
        """The same for another batch, which must not draw with the same random numbers; without a seed unchanged."""
        return self if self.seed is None else replace(self, seed=self.seed + offset)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest of each row at -inf; ties with the k-th stay."""
    k = min(k, logits.shape[-1])
    threshold = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with all tokens at -inf that the likelier ones before them already bring to probability p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
    drop = (before >= p).scatter(-1, order, before >= p)  # back to vocabulary order
    return logits.masked_fill(drop, float("-inf"))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Logits (B, V) with all tokens at -inf that are less than `min_p` times as likely as the row's likeliest."""
    log_ratio = logits - logits.max(dim=-1, keepdim=True).values
    return logits.masked_fill(log_ratio.exp() < min_p, float("-inf"))


def filtered_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits (B, V) after temperature and filters; softmax of it is the distribution that `sample` draws from."""
    logits = logits.float() / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p:
        logits = keep_min_p(logits, params.min_p)
    return logits


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Next token ids (B,) int64 from logits (B, V)."""
    if params.greedy:
        return logits.argmax(dim=-1)
    probabilities = filtered_logits(logits, params).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
