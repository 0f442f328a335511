"""Bytes that the forward pass leaves behind for the backward pass: published formulas, and this course's model exactly.

Symbols: B batch, T time, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size.
"""

from __future__ import annotations

from typing import Any

from llmcourse.accounting.flops import matmul_weights
from llmcourse.accounting.shapes import ModelShape, shape_of

PRECISIONS = {"fp32": 4, "bf16": 2}
FULL = 4  # bytes of a float32, in which autocast keeps the residual stream and the norms
BLOCK = 128  # queries of one block in `models.attention.blocked_causal_attention`
BLOCKED_FROM = 33  # shortest sequence that takes the blocked kernel on the CPU
CHECKPOINTING = ("none", "selective", "full")


def published_activation_bytes(
    config: Any, batch: int, context: int, *, checkpointing: str = "none"
) -> float:
    """Activations of a GPT block stack in 16 bits by Korthikanti et al. (2022, eq. 2 and table 2), without parallelism.

    Per layer, with s = context, b = batch, h = d_model, a = heads: s b h (34 + 5 a s / h); 34 s b h when the attention
    weights are computed again ("selective"); 2 s b h when only a block's input is kept ("full"). The formula assumes
    d_ff = 4 d_model, dropout, and attention weights that are stored.

    Raises:
        ValueError: an unknown kind of checkpointing.
    """
    _check_checkpointing(checkpointing)
    shape = shape_of(config)
    weights = 5 * shape.n_heads * context / shape.d_model
    per_value = {"none": 34 + weights, "selective": 34.0, "full": 2.0}[checkpointing]
    return shape.n_layers * batch * context * shape.d_model * per_value


def saved_activations(
    config: Any,
    batch: int,
    context: int | None = None,
    *,
    precision: str = "bf16",
    compiled: bool = False,
    attention: str = "blocked",
    checkpointing: str = "none",
) -> dict[str, int]:
    """Bytes that autograd keeps of one forward pass of `models.Transformer` and its loss, by kind of tensor.

    Exact for eager PyTorch (a test compares it with what autograd saves); with `compiled=True`, what torch.compile's
    partitioner chooses to keep: matrix products' inputs and outputs, but nothing that element-wise work can restore.

    Args:
        config: a `ModelConfig` or shape of our family: dense, gated, RMSNorm, no biases.
        batch: rows B of a micro-batch.
        context: tokens T of a row; `None` is the model's context length.
        precision: "bf16" for bfloat16 autocast over float32 weights, or "fp32".
        compiled: whether the loss runs under torch.compile.
        attention: "blocked" (CPU, stores the weights) or "fused" (SDPA's flash kernel: stores the output only).
        checkpointing: "none", or "full": each block keeps its input and computes the rest again, one block at a time.

    Returns:
        residual, norms, attention, mlp, logits, tokens, and weight_copies (weights cast down for the products).

    Raises:
        ValueError: a model of another family, an unknown precision, attention or kind of checkpointing.
    """
    shape = _our_family(config)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose bf16 or fp32")
    if attention not in ("blocked", "fused"):
        raise ValueError(f"attention={attention!r}: choose blocked or fused")
    _check_checkpointing(checkpointing)
    if checkpointing == "selective":
        raise ValueError("checkpointing='selective': our model knows none and full")
    T = context or shape.context_length
    low = PRECISIONS[precision]
    layer = _layer(shape, batch, T, low, compiled, attention)
    once = 1 if checkpointing == "full" else shape.n_layers
    parts = {name: once * size for name, size in layer.items()}
    if checkpointing == "full":  # the block at work holds its input too, so that one is counted already
        parts["residual"] += (shape.n_layers - 1) * FULL * batch * T * shape.d_model
    elif compiled:  # the last block keeps the sum after attention, the others the summand
        parts["residual"] += (FULL - low) * batch * T * shape.d_model
    for name, size in _ends(shape, batch, T, low, compiled).items():
        parts[name] = parts.get(name, 0) + size
    parts["weight_copies"] = low * matmul_weights(shape) if low < FULL else 0
    return parts


def loss_work_bytes(config: Any, batch: int, context: int | None = None, *, compiled: bool = False) -> int:
    """Bytes beside the saved ones at the peak, where the backward pass begins, of eager cross-entropy.

    The gradients of the log-probabilities and of the logits are alive together, two float32 tensors (B, T, V). A
    compiled loss makes neither.
    """
    shape = shape_of(config)
    return 0 if compiled else 2 * FULL * batch * (context or shape.context_length) * shape.vocab_size


def evaluation_bytes(config: Any, batch: int, context: int | None = None) -> int:
    """Peak bytes of an eager float32 forward pass and loss without gradients, `evaluation.perplexity.token_loss`.

    The larger of two moments: logits and log-probabilities (B, T, V) together at the end, or, in the last query block
    of an attention layer, scores, biased scores and weights (B, H, n, T) beside the layer's own tensors.
    """
    shape = _our_family(config)
    T = context or shape.context_length
    at_the_loss = 2 * shape.vocab_size + shape.d_model
    heads = (3 * shape.n_heads + 2 * shape.n_kv_heads) * shape.d_head
    in_attention = 3 * shape.n_heads * min(BLOCK, T) + heads + 2 * shape.d_model
    return FULL * batch * T * max(at_the_loss, in_attention)


def _our_family(config: Any) -> ModelShape:
    shape = shape_of(config)
    plain = shape.gated_mlp and not (shape.norm_bias or shape.qkv_bias or shape.mlp_bias or shape.output_bias)
    if not plain or shape.n_experts or shape.learned_positions or shape.norms_per_block != 2:
        raise ValueError(
            "exact activations are known for this course's model alone (dense, gated, RMSNorm, no biases): "
            "use published_activation_bytes for others"
        )
    return shape


def _layer(shape: ModelShape, batch: int, T: int, low: int, compiled: bool, attention: str) -> dict[str, int]:
    """Bytes of one block; `low` is the size of a value that a matrix product reads."""
    tokens, D, F = batch * T, shape.d_model, shape.d_ff
    casts = (
        1 if compiled or low == FULL else 3
    )  # eager autocast casts a linear layer's input for each layer anew
    mlp_casts = 1 if compiled or low == FULL else 2
    norm = FULL + (0 if compiled else FULL * D)  # 1 / rms, and the normalized input
    mixed = _fused(shape, tokens, low) if attention == "fused" else _blocked(shape, batch, T, low, compiled)
    hidden = (3 if compiled else 4) * low * F  # gate, up, their product, and SiLU(gate) if eager
    return {
        "residual": tokens * (FULL * D + (low if compiled else FULL) * D),
        "norms": tokens * 2 * norm,
        "attention": tokens * (casts * low * D + low * shape.n_heads * shape.d_head)
        + mixed
        + _query_key_norm(shape, tokens, low, compiled),
        "mlp": tokens * (mlp_casts * low * D + hidden),
    }


def _query_key_norm(shape: ModelShape, tokens: int, low: int, compiled: bool) -> int:
    """Inputs, 1 / rms and normalized values of the query and key norms, where there are any."""
    if not shape.qk_norm:
        return 0
    heads = shape.n_heads + shape.n_kv_heads
    values = low if compiled else FULL + low
    return tokens * heads * (FULL + values * shape.d_head)


def _fused(shape: ModelShape, tokens: int, low: int) -> int:
    """Queries, keys, values and a log-sum-exp per head; the output is saved by the projection that reads it."""
    heads = shape.n_heads + 2 * shape.n_kv_heads
    return tokens * (low * heads * shape.d_head + FULL * shape.n_heads)


def _blocked(shape: ModelShape, batch: int, T: int, low: int, compiled: bool) -> int:
    """Blocks of queries with the keys, values and attention weights that each block reads."""
    ends = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
    visible = sum((end - start) * end for start, end in zip(range(0, T, BLOCK), ends, strict=True))
    slices = sum(ends)
    # A slice of keys or values is a copy, unless one row or one key head lets PyTorch take a view of the whole.
    views = not compiled and (batch == 1 or shape.n_kv_heads == 1)
    keys = T if views and low == FULL else slices
    values = T if views else slices
    per_row = shape.n_heads * visible + shape.n_heads * shape.d_head * T
    return low * batch * (per_row + shape.n_kv_heads * shape.d_head * (keys + values))


def _ends(shape: ModelShape, batch: int, T: int, low: int, compiled: bool) -> dict[str, int]:
    """Final norm, head and loss."""
    tokens, D, V = batch * T, shape.d_model, shape.vocab_size
    return {
        "residual": tokens * FULL * D,
        "norms": tokens * (FULL + (0 if compiled else FULL * D)) + tokens * low * D,
        "logits": tokens * ((low * V + 2 * FULL) if compiled else FULL * V),
        "tokens": tokens * (8 if compiled else 16),
    }


def _check_checkpointing(kind: str) -> None:
    if kind not in CHECKPOINTING:
        raise ValueError(f"checkpointing={kind!r}: choose one of {', '.join(CHECKPOINTING)}")
