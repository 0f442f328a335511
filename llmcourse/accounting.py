"""Parameters, FLOPs and bytes of a decoder, by arithmetic alone (no torch).

Symbols: N parameters, T context, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size.
A multiplication and an addition count as two FLOPs.
"""

from __future__ import annotations

from typing import Protocol


class Shape(Protocol):
    """The sizes that the arithmetic needs; `ModelConfig` has them."""

    vocab_size: int
    context_length: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int | None
    d_ff: int
    tie_embeddings: bool
    qk_norm: bool


def count_parameters(config: Shape, *, embeddings: bool = True) -> int:
    """Number of trainable parameters; `embeddings=False` leaves out the embedding (and an untied head)."""
    attention = config.d_model * config.d_head * (2 * config.n_heads + 2 * config.n_kv_heads)
    norms = 2 * config.d_model + (2 * config.d_head if config.qk_norm else 0)
    block = attention + 3 * config.d_model * config.d_ff + norms
    matrices = 1 if config.tie_embeddings else 2
    return (
        config.n_layers * block
        + config.d_model
        + (matrices * config.vocab_size * config.d_model if embeddings else 0)
    )


def forward_flops_per_token(config: Shape, context: int | None = None) -> float:
    """FLOPs of one token's forward pass in a sequence of `context` tokens (default: the model's context length).

    Matrix products only: projections, feed-forward, head (2 per weight), and the attention products over the
    (context + 1) / 2 positions that a token sees on average under the causal mask.
    """
    context = context or config.context_length
    attention = config.d_model * config.d_head * (2 * config.n_heads + 2 * config.n_kv_heads)
    weights = (
        config.n_layers * (attention + 3 * config.d_model * config.d_ff) + config.vocab_size * config.d_model
    )
    visible = (context + 1) / 2
    return 2 * weights + config.n_layers * 4 * config.n_heads * config.d_head * visible


def training_flops_per_token(config: Shape, context: int | None = None) -> float:
    """Forward plus backward: the backward pass has two products for each one of the forward pass, so three times it.

    For large models this tends to 6 N (Kaplan et al., 2020, section 2.1).
    """
    return 3 * forward_flops_per_token(config, context)


def kv_cache_bytes(config: Shape, n_tokens: int, batch_size: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of `n_tokens` tokens a row: 2 x layers x K x C values a token."""
    values = 2 * config.n_layers * config.n_kv_heads * config.d_head
    return values * n_tokens * batch_size * bytes_per_value


def model_flops_utilization(
    config: Shape, tokens_per_second: float, peak_flops: float, context: int | None = None
) -> float:
    """MFU: the FLOP/s that the model's arithmetic needs over the device's peak FLOP/s (Chowdhery et al., 2022, app. B)."""
    return tokens_per_second * training_flops_per_token(config, context) / peak_flops
