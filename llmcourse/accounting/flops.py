"""FLOPs of a decoder's matrix products: forward, training, the 6 N D rule and where it fails, and MFU.

A multiplication and an addition count as two FLOPs. Element-wise work (norms, activations, softmax, optimizer) is left
out, as in published counts: it is a few percent of the FLOPs, though not of the time.

Symbols: N parameters, T context, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size.
"""

from __future__ import annotations

from typing import Any

from llmcourse.accounting.parameters import active_parameters, attention_weights
from llmcourse.accounting.shapes import ModelShape, shape_of


def matmul_weights(config: Any) -> int:
    """Matrix entries that multiply each token: projections, feed-forward or active experts, router, head.

    The embedding is a table look-up and multiplies nothing; tied to the head it is counted once, as the head.
    """
    shape = shape_of(config)
    return shape.n_layers * attention_weights(shape) + _mlp_weights(shape) + shape.vocab_size * shape.d_model


def _mlp_weights(shape: ModelShape) -> int:
    per_width = shape.mlp_matrices * shape.d_model
    dense = shape.n_dense_layers * per_width * shape.d_ff
    used = shape.n_active_experts * shape.d_expert + shape.d_shared_expert
    router = shape.d_model * (shape.n_experts + bool(shape.d_shared_expert))
    return dense + shape.n_mixture_layers * (per_width * used + router)


def forward_flops(config: Any, n_tokens: int | None = None, *, causal: bool = True) -> int:
    """FLOPs of one forward pass over a sequence of `n_tokens` tokens (default: the model's context length).

    Args:
        config: anything that `shape_of` accepts.
        n_tokens: length T of the sequence.
        causal: True counts the T (T + 1) / 2 pairs of positions that the mask leaves; False all T x T, as published
            counts do (GPT-2 124M at 1 024 tokens: 291 648 307 200).

    Raises:
        ValueError: `n_tokens` is below 1.
    """
    shape = shape_of(config)
    T = _length(shape, n_tokens)
    pairs = T * (T + 1) // 2 if causal else T * T
    # Q K^T and (weights) V: 2 FLOPs x C channels x H heads for each pair, twice
    attention = shape.n_layers * 4 * shape.n_heads * shape.d_head * pairs
    return 2 * T * matmul_weights(shape) + attention


def forward_flops_per_token(config: Any, context: int | None = None) -> float:
    """FLOPs of one token's forward pass in a sequence of `context` tokens (default: the model's context length).

    Matrix products only: projections, feed-forward, head (2 per weight), and the attention products over the
    (context + 1) / 2 positions that a token sees on average under the causal mask.
    """
    shape = shape_of(config)
    T = _length(shape, context)
    return forward_flops(shape, T) / T


def decode_flops(config: Any, context: int) -> int:
    """FLOPs of generating one token when `context` positions, its own included, are attended to."""
    shape = shape_of(config)
    attention = shape.n_layers * 4 * shape.n_heads * shape.d_head * _length(shape, context)
    return 2 * matmul_weights(shape) + attention


def training_flops(
    config: Any, n_tokens: int | None = None, *, causal: bool = True, checkpointing: bool = False
) -> int:
    """FLOPs of forward and backward pass over one sequence.

    The backward pass has two products for each one of the forward pass, one for the input's gradient and one for the
    weight's, so the whole is three times the forward pass. Full activation checkpointing runs the blocks' forward pass
    a second time: the sum is then nearly four times the forward pass (Korthikanti et al., 2022, section 5).
    """
    shape = shape_of(config)
    T = _length(shape, n_tokens)
    forward = forward_flops(shape, T, causal=causal)
    head = 2 * T * shape.vocab_size * shape.d_model
    return 3 * forward + (forward - head if checkpointing else 0)


def training_flops_per_token(config: Any, context: int | None = None) -> float:
    """Forward plus backward: the backward pass has two products for each one of the forward pass, so three times it.

    For large models this tends to 6 N (Kaplan et al., 2020, section 2.1).
    """
    return 3 * forward_flops_per_token(config, context)


def six_nd(config: Any, n_tokens: float, *, embeddings: bool = True) -> float:
    """The approximation 6 N D of training on `n_tokens` tokens; N counts active parameters.

    With `embeddings=False`, N is Kaplan et al.'s (2020); Hoffmann et al. (2022) count embeddings.
    """
    return 6.0 * active_parameters(config, embeddings=embeddings) * n_tokens


def six_nd_error(config: Any, context: int | None = None, *, embeddings: bool = True) -> float:
    """How far 6 N D is off the exact count, as a fraction of it: -0.2 means a fifth too little.

    It is off where attention's products are not small beside the weights' (T not small beside 12 D under the causal
    mask), or where the embedding is not small beside the blocks and counted wrongly (untied: its look-up costs nothing
    but counts 6 V D).
    """
    return six_nd(config, 1, embeddings=embeddings) / training_flops_per_token(config, context) - 1


def model_flops_utilization(
    config: Any, tokens_per_second: float, peak_flops: float, context: int | None = None
) -> float:
    """MFU: the FLOP/s that the model's arithmetic needs over the device's peak FLOP/s (Chowdhery et al., 2022, app.
    B)."""
    return tokens_per_second * training_flops_per_token(config, context) / peak_flops


def _length(shape: ModelShape, n_tokens: int | None) -> int:
    length = shape.context_length if n_tokens is None else n_tokens
    if length < 1:
        raise ValueError(f"{length} tokens: give at least 1")
    return length
