"""FLOPs and bytes of each kind of layer: what puts it on the roofline; and the matrix products it consists of.

Symbols: B batch, T time, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size. A product (m, k)
x (k, n) has 2 m k n FLOPs and moves, when each operand crosses the memory bus once, m k + k n + m n values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmcourse.accounting.parameters import count_parameters
from llmcourse.accounting.shapes import ModelShape, shape_of

PHASES = ("training", "prefill", "decode")
FULL = 4  # bytes of a float32, in which gradients are applied and optimizer states are kept
NORM_FLOPS = 4  # square, add, two multiplications a value
SOFTMAX_FLOPS = 5  # maximum, subtract, exponential, add, divide a value
ADAMW_FLOPS = 12  # a parameter, counted in `training.optimizers.adamw_step`


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One kind of layer, all blocks together."""

    name: str
    """what the row is called"""
    flops: float
    """operations"""
    bytes: float
    """bytes to and from memory, each operand once"""

    @property
    def intensity(self) -> float:
        """FLOPs per byte: the roofline's horizontal axis (Williams et al., 2009)."""
        return self.flops / self.bytes


@dataclass(frozen=True, kw_only=True)
class Product:
    """`count` alike matrix products (m, k) x (k, n), each a stack of `batch`."""

    name: str
    """which layer"""
    m: int
    """rows of the result"""
    k: int
    """length of the sums"""
    n: int
    """columns of the result"""
    batch: int = 1
    """products that share one call"""
    count: int = 1
    """calls in one forward pass"""
    weight: bool = True
    """whether the second operand is a weight, stored (n, k)"""

    @property
    def flops(self) -> int:
        """FLOPs of all calls of the forward pass."""
        return 2 * self.m * self.k * self.n * self.batch * self.count

    @property
    def values(self) -> int:
        """Values of both operands and of the result, all calls."""
        sizes = self.m * self.k + self.k * self.n + self.m * self.n
        return sizes * self.batch * self.count


def matrix_products(config: Any, batch: int, context: int, *, block: int | None = 128) -> list[Product]:
    """The products of one forward pass over B = `batch` rows of T = `context` tokens of a dense model.

    Attention goes `block` queries at a time against the keys up to the block's end, as in
    `models.attention.blocked_causal_attention`; `None` takes all T x T at once.

    Raises:
        ValueError: a mixture of experts, or sizes below 1.
    """
    shape = shape_of(config)
    if shape.n_experts:
        raise ValueError("matrix_products knows dense models: a mixture's products depend on the routing")
    _check_sizes(batch, context)
    tokens, D, L = batch * context, shape.d_model, shape.n_layers
    query, key = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    products = [
        Product(name="query", m=tokens, k=D, n=query, count=L),
        Product(name="key, value", m=tokens, k=D, n=key, count=2 * L),
        *_attention_products(shape, batch, context, block or context),
        Product(name="output", m=tokens, k=query, n=D, count=L),
        Product(name="mlp in", m=tokens, k=D, n=shape.d_ff, count=(shape.mlp_matrices - 1) * L),
        Product(name="mlp out", m=tokens, k=shape.d_ff, n=D, count=L),
        Product(name="head", m=tokens, k=D, n=shape.vocab_size),
    ]
    return products


def _attention_products(shape: ModelShape, batch: int, T: int, block: int) -> list[Product]:
    groups, stack = shape.n_heads // shape.n_kv_heads, batch * shape.n_kv_heads
    found: dict[tuple[int, int], int] = {}
    for start in range(0, T, block):
        end = min(start + block, T)
        found[groups * (end - start), end] = found.get((groups * (end - start), end), 0) + shape.n_layers
    products = []
    for (rows, end), count in found.items():
        shared = {"m": rows, "batch": stack, "count": count, "weight": False}
        products.append(Product(name="scores", k=shape.d_head, n=end, **shared))
        products.append(Product(name="weighted values", k=end, n=shape.d_head, **shared))
    return products


def layer_costs(
    config: Any,
    batch: int,
    context: int | None = None,
    bytes_per_value: float = 2,
    phase: str = "training",
    *,
    fused_attention: bool = False,
) -> list[LayerCost]:
    """FLOPs and bytes of each kind of layer in one step.

    Args:
        config: anything that `shape_of` accepts.
        batch: rows B.
        context: tokens T of a row; in "decode" the positions attended to. `None` is the model's context length.
        bytes_per_value: bytes of an activation and of a weight as the products read it.
        phase: "training" (forward, backward, AdamW), "prefill" (forward), "decode" (one new token a row).
        fused_attention: whether attention weights stay on the chip (Dao et al., 2022) instead of crossing the bus.

    Returns:
        embedding, norms, query key value, attention, output, feed-forward, head, loss (training), optimizer (training).

    Raises:
        ValueError: an unknown phase, or sizes below 1.
    """
    shape = shape_of(config)
    context = shape.context_length if context is None else context
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: choose one of {', '.join(PHASES)}")
    _check_sizes(batch, context)
    T = 1 if phase == "decode" else context
    passes = 3 if phase == "training" else 1
    tokens, D, L = batch * T, shape.d_model, shape.n_layers
    query, key = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    rows = [
        ("embedding", 0, 2 * tokens * D),
        ("norms", NORM_FLOPS * tokens * D * _norms(shape), 2 * tokens * D * _norms(shape)),
        ("query, key, value", *_linear(tokens, D, query + 2 * key, L)),
        ("attention", *_attention(shape, batch, T, context, fused_attention)),
        ("output", *_linear(tokens, query, D, L)),
        ("feed-forward", *_feed_forward(shape, tokens)),
        ("head", *_linear(tokens, D, shape.vocab_size, 1)),
    ]
    costs = [
        LayerCost(name=name, flops=passes * flops, bytes=passes * bytes_per_value * values)
        for name, flops, values in rows
    ]
    return costs + (_training_rows(shape, tokens) if phase == "training" else [])


def _training_rows(shape: ModelShape, tokens: int) -> list[LayerCost]:
    """The loss (logits read and their gradient written in float32), and AdamW (7 float32 values a parameter)."""
    logits, n = tokens * shape.vocab_size, count_parameters(shape)
    return [
        LayerCost(name="loss", flops=SOFTMAX_FLOPS * logits, bytes=2 * FULL * logits),
        LayerCost(name="optimizer", flops=ADAMW_FLOPS * n, bytes=7 * FULL * n),
    ]


def _norms(shape: ModelShape) -> int:
    return shape.norms_per_block * shape.n_layers + 1


def _linear(rows: int, inside: int, outside: int, count: int) -> tuple[int, int]:
    """FLOPs and values of `count` products (rows, inside) x (inside, outside)."""
    values = rows * inside + inside * outside + rows * outside
    return 2 * rows * inside * outside * count, values * count


def _attention(shape: ModelShape, batch: int, T: int, context: int, fused: bool) -> tuple[int, int]:
    """Both products and the softmax over the visible pairs of positions."""
    pairs = batch * (context if T == 1 else T * (T + 1) // 2) * shape.n_heads
    flops = 4 * shape.d_head * pairs + SOFTMAX_FLOPS * pairs
    queries = batch * T * shape.n_heads * shape.d_head
    keys = batch * context * shape.n_kv_heads * shape.d_head
    # scores and weights are each written once and read once
    values = 2 * queries + 2 * keys + (0 if fused else 4 * pairs)
    return flops * shape.n_layers, values * shape.n_layers


def _feed_forward(shape: ModelShape, tokens: int) -> tuple[float, float]:
    """Dense layers and mixtures. A mixture reads the experts that uniform routing of all tokens is expected to
    touch."""
    D, matrices = shape.d_model, shape.mlp_matrices
    dense_flops, dense_values = _mlp(tokens, D, shape.d_ff, matrices)
    flops, values = shape.n_dense_layers * dense_flops, float(shape.n_dense_layers * dense_values)
    if shape.n_experts:
        idle = (1 - shape.n_active_experts / shape.n_experts) ** tokens
        touched = shape.n_experts * (1 - idle)
        used = shape.n_active_experts * tokens
        shared = _mlp(tokens, D, shape.d_shared_expert, matrices) if shape.d_shared_expert else (0, 0)
        router = _linear(tokens, D, shape.n_experts, 1)
        routed_flops = 2 * used * matrices * D * shape.d_expert
        routed_values = matrices * (touched * D * shape.d_expert + used * (D + shape.d_expert))
        flops += shape.n_mixture_layers * (routed_flops + shared[0] + router[0])
        values += shape.n_mixture_layers * (routed_values + shared[1] + router[1])
    return flops, values


def _mlp(tokens: int, d_model: int, width: int, matrices: int) -> tuple[int, int]:
    return _linear(tokens, d_model, width, matrices)


def _check_sizes(batch: int, context: int) -> None:
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")


def newton_schulz_products(config: Any, iterations: int = 5) -> list[Product]:
    """The products of one Muon step of this course's dense model: three for each iteration and group of equal matrices.

    X X^T, its square, and their combination times X, with X (r, c) the matrix lying on its long side (Jordan et al.,
    2024).
    """
    products = []
    for r, c, number in _muon_groups(shape_of(config)):
        shared = {"name": "newton-schulz", "batch": number, "count": iterations, "weight": False}
        products += [Product(m=r, k=k, n=n, **shared) for k, n in ((c, r), (r, r), (r, c))]
    return products


def _muon_groups(shape: ModelShape) -> list[tuple[int, int, int]]:
    """Short side, long side and number of the hidden matrices of each shape."""
    D, L = shape.d_model, shape.n_layers
    query, key = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    matrices = [(query, D, L), (key, D, 2 * L), (D, query, L)]
    matrices += [(shape.d_ff, D, (shape.mlp_matrices - 1) * L), (D, shape.d_ff, L)]
    groups: dict[tuple[int, int], int] = {}
    for rows, columns, number in matrices:
        groups[rows, columns] = groups.get((rows, columns), 0) + number
    return [(min(sides), max(sides), number) for sides, number in groups.items()]


def newton_schulz_bytes(config: Any, iterations: int = 5, *, bytes_per_value: int = 2) -> int:
    """Bytes of the sums and multiples between the products of `newton_schulz_products`, each operand once.

    An iteration a X + (b G + c G G) X has 5 passes over X (a X: 2, the sum: 3) and 7 over G (b G: 2, c G: 2, their sum:
    3).
    """
    groups = _muon_groups(shape_of(config))
    values = sum(number * (5 * r * c + 7 * r * r) for r, c, number in groups)
    return bytes_per_value * iterations * values


def element_wise_bytes(
    config: Any, batch: int, context: int | None = None, *, bytes_per_value: int = 2, block: int = 128
) -> dict[str, int]:
    """Bytes that the element-wise kernels of a compiled training step of this course's model move, by kind.

    Fusion makes one kernel of everything between two matrix products; a kernel reads its inputs and writes its outputs
    once. `w` values are in the products' precision, the residual stream and its gradient in float32. Forward plus
    backward: norms 5 passes in each precision, softmax's gradient 3 passes over the weights, the activation 4 over the
    hidden width, rotation and head layout 8 over the heads. "exponentials" are one read and one write for each
    exponential: one a weight, two a hidden value, two a logit; on a CPU they are bound by arithmetic, not by memory.
    """
    shape = shape_of(config)
    T = shape.context_length if context is None else context
    _check_sizes(batch, T)
    w, L, tokens = bytes_per_value, shape.n_layers, batch * T
    pairs = sum((min(s + block, T) - s) * min(s + block, T) for s in range(0, T, block)) * batch
    weights, hidden = L * shape.n_heads * pairs, L * tokens * shape.d_ff
    heads = L * tokens * (shape.n_heads + shape.n_kv_heads) * shape.d_head
    return {
        "norms and residual": 5 * (FULL + w) * _norms(shape) * tokens * shape.d_model,
        "softmax gradient": 3 * w * weights,
        "activation": 4 * w * hidden,
        "rotation and layout": 8 * w * heads,
        "exponentials": 2 * w * (weights + 2 * hidden + 2 * tokens * shape.vocab_size),
    }
