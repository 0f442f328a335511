"""Parameters of a decoder: in all, by part, active per token, without embeddings.

Symbols: D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size, T context_length.
"""

from __future__ import annotations

from typing import Any

from llmcourse.accounting.shapes import ModelShape, shape_of


def count_parameters(config: Any, *, embeddings: bool = True) -> int:
    """Number of trainable parameters.

    Args:
        config: anything that `shape_of` accepts.
        embeddings: False leaves out the token embedding, an untied head, and a table of positions.
    """
    parts = parameters_by_part(config)
    outside = 0 if embeddings else parts["embedding"] + parts["positions"] + parts["head"]
    return sum(parts.values()) - outside


def parameters_by_part(config: Any) -> dict[str, int]:
    """Parameters of each part of the whole model; the values sum to `count_parameters`.

    Parts: embedding, positions, attention, mlp (dense layers), experts, router, norms, head (0 when tied).
    """
    shape = shape_of(config)
    return {
        "embedding": shape.vocab_size * shape.d_model,
        "positions": shape.context_length * shape.d_model if shape.learned_positions else 0,
        "attention": shape.n_layers * attention_parameters(shape),
        "mlp": shape.n_dense_layers * mlp_parameters(shape, shape.d_ff),
        "experts": shape.n_mixture_layers * _experts(shape, shape.n_experts),
        "router": shape.n_mixture_layers * shape.d_model * (shape.n_experts + bool(shape.d_shared_expert)),
        "norms": _norms(shape),
        "head": 0 if shape.tie_embeddings else shape.vocab_size * shape.d_model,
    }


def active_parameters(config: Any, *, embeddings: bool = True) -> int:
    """Parameters that one token uses: in mixture layers only `n_active_experts` of the experts (and the shared one)."""
    shape = shape_of(config)
    idle = _experts(shape, shape.n_experts) - _experts(shape, shape.n_active_experts)
    return count_parameters(shape, embeddings=embeddings) - shape.n_mixture_layers * idle


def attention_weights(shape: ModelShape) -> int:
    """Entries of one block's four projections, D C (2 H + 2 K)."""
    return shape.d_model * shape.d_head * (2 * shape.n_heads + 2 * shape.n_kv_heads)


def attention_parameters(shape: ModelShape) -> int:
    """Parameters of one block's attention with biases, without query and key norms."""
    qkv = shape.d_head * (shape.n_heads + 2 * shape.n_kv_heads) if shape.qkv_bias else 0
    return attention_weights(shape) + qkv + (shape.d_model if shape.output_bias else 0)


def mlp_parameters(shape: ModelShape, width: int) -> int:
    """Parameters of one feed-forward layer or expert of hidden `width`, biases included."""
    biases = (shape.mlp_matrices - 1) * width + shape.d_model if shape.mlp_bias else 0
    return shape.mlp_matrices * shape.d_model * width + biases


def _experts(shape: ModelShape, number: int) -> int:
    shared = mlp_parameters(shape, shape.d_shared_expert) if shape.d_shared_expert else 0
    return number * mlp_parameters(shape, shape.d_expert) + shared


def _norms(shape: ModelShape) -> int:
    wide = (shape.norms_per_block * shape.n_layers + 1) * shape.d_model * (2 if shape.norm_bias else 1)
    if not shape.qk_norm:
        return wide
    heads = shape.n_heads + shape.n_kv_heads if shape.qk_norm_all_heads else 2
    return wide + shape.n_layers * heads * shape.d_head
