"""Exercises of chapter 01: attention, its mask, rotary positions, grouped heads, and the layers of a block.

Shapes: B batch, T time, D d_model, H query heads, K key/value heads, G = H / K, C d_head, F d_ff.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmcourse.accounting import kv_cache_bytes
from llmcourse.checks.comparison import difference
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.models import ModelConfig
from llmcourse.models.attention import (
    apply_rope,
    causal_mask,
    repeat_kv,
    rms_norm,
    rope_tables,
    scaled_dot_product_attention,
    swiglu,
)
from llmcourse.models.transformer import Block


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _heads(
    generator: torch.Generator, n_queries: int, n_keys: int, scale: float = 1.0, width: int = 8
) -> tuple[Tensor, ...]:
    """q (2, 3, Tq, C), k and v (2, 3, Tk, C) of that width; `scale` multiplies the queries."""
    q = scale * _normal(generator, 2, 3, n_queries, width)
    return q, _normal(generator, 2, 3, n_keys, width), _normal(generator, 2, 3, n_keys, width)


# --- Section 1: attention as a lookup ------------------------------------------------------------------------------


def _lookup_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Case(_heads(generator, 5, 7), name="5 queries, 7 keys"),
        Case(_heads(generator, 1, 4), name="one query"),
        # Large scores show every rounding. The root of this width is a power of two, so it rounds nothing wherever
        # an answer divides by it.
        Case(_heads(generator, 6, 5, scale=400.0, width=16), name="scores in the hundreds"),
    ]


def _weighted(scores: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    return scores.softmax(dim=dim) @ v


def _unnormalized_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


LOOKUP = Exercise(
    id="lookup",
    title="Attention as a soft lookup",
    points=2,
    reference=scaled_dot_product_attention,
    cases=_lookup_cases,
    mutants=(
        Mutant(
            "no-scale",
            lambda q, k, v: _weighted(q @ k.mT, v),
            "You seem to leave the scores unscaled: divide Q K^T by the square root of the head width, q.shape[-1].",
        ),
        Mutant(
            "scale-by-width",
            lambda q, k, v: _weighted(q @ k.mT / q.shape[-1], v),
            "You seem to divide by the head width itself: its square root is what keeps the variance at 1.",
        ),
        Mutant(
            "scale-by-keys",
            lambda q, k, v: _weighted(q @ k.mT / math.sqrt(k.shape[-2]), v),
            "You seem to divide by the root of the number of keys: the sum in a score runs over channels, q.shape[-1].",
        ),
        Mutant(
            "softmax-over-queries",
            lambda q, k, v: _weighted(q @ k.mT / math.sqrt(q.shape[-1]), v, dim=-2),
            "You seem to normalize over the queries: each query's weights must sum to 1 over the keys, dim=-1.",
        ),
        Mutant(
            "overflow",
            _unnormalized_exponentials,
            "You seem to exponentiate the scores as they are, which overflows: use softmax, or subtract each row's "
            "maximum first.",
        ),
        Mutant(
            "keys-as-values",
            lambda q, k, v: _weighted(q @ k.mT / math.sqrt(q.shape[-1]), k),
            "You seem to average the keys: keys decide the weights, values are what is averaged.",
        ),
    ),
    hints=(
        "Scores are q @ k.mT / sqrt(C), with shape (B, H, Tq, Tk); softmax over the last axis; then @ v.",
    ),
)

# --- Section 2: the causal mask ------------------------------------------------------------------------------------


def _mask_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    n_keys = int(torch.randint(6, 10, (1,), generator=generator))
    return [
        Case((5, 5), name="5 queries, 5 keys"),
        Case((3, n_keys), name=f"3 new queries, {n_keys} keys"),
        Case((1, 4), name="one new query, 4 keys"),
    ]


def _ones(n_queries: int, n_keys: int) -> Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool)


MASK = Exercise(
    id="mask",
    title="The causal mask",
    points=1,
    reference=causal_mask,
    cases=_mask_cases,
    mutants=(
        Mutant(
            "future-only",
            lambda n_queries, n_keys: _ones(n_queries, n_keys).triu(n_keys - n_queries),
            "You seem to let every query see the present and the future: True belongs on and below the diagonal.",
        ),
        Mutant(
            "inverted",
            lambda n_queries, n_keys: ~causal_mask(n_queries, n_keys),
            "You seem to mark what is forbidden: here True means that the query may attend to the key.",
        ),
        Mutant(
            "strict",
            lambda n_queries, n_keys: _ones(n_queries, n_keys).tril(n_keys - n_queries - 1),
            "You seem to hide each position from itself: query i may attend to key i too.",
        ),
        Mutant(
            "no-offset",
            lambda n_queries, n_keys: _ones(n_queries, n_keys).tril(),
            "You seem to number the queries from 0 when they are the last ones: with stored keys, query i stands at "
            "position i + n_keys - n_queries.",
        ),
        Mutant(
            "everything",
            _ones,
            "You seem to allow every pair: a query must not see keys that come after it.",
        ),
    ),
    hints=(
        "Compare two ranges: key positions 0 .. n_keys - 1, query positions n_keys - n_queries .. n_keys - 1.",
    ),
)


def _masked_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    square, tail = _heads(generator, 6, 6), _heads(generator, 3, 7)
    window = causal_mask(7, 7) & ~causal_mask(7, 7).tril(-3)
    return [
        Case((*square, causal_mask(6, 6)), name="6 x 6 causal"),
        Case((*tail, causal_mask(3, 7)), name="3 new queries, 7 keys"),
        Case((*_heads(generator, 7, 7, scale=4.0), window), name="a window of 3 keys"),
    ]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


MASKED = Exercise(
    id="masked",
    title="Masked attention",
    points=2,
    reference=scaled_dot_product_attention,
    cases=_masked_cases,
    mutants=(
        Mutant(
            "unmasked",
            lambda q, k, v, mask: _weighted(_scores(q, k), v),
            "You seem to leave the mask unused: every query still sees the future.",
        ),
        Mutant(
            "inverted",
            lambda q, k, v, mask: _weighted(_scores(q, k).masked_fill(mask, -1e30), v),
            "You seem to hide what is allowed: fill the scores where the mask is False (~mask).",
        ),
        Mutant(
            "zero-scores",
            lambda q, k, v, mask: _weighted(_scores(q, k).masked_fill(~mask, 0.0), v),
            "You seem to set hidden scores to 0: exp(0) = 1 still takes weight; minus infinity takes none.",
        ),
        Mutant(
            "after-softmax",
            lambda q, k, v, mask: (_scores(q, k).softmax(dim=-1) * mask) @ v,
            "You seem to zero the weights after the softmax: the rows no longer sum to 1, and the hidden keys have "
            "already taken part in the sum. Mask the scores.",
        ),
        Mutant(
            "multiplied-scores",
            lambda q, k, v, mask: _weighted(_scores(q, k) - 1.0 * ~mask, v),
            "You seem to lower hidden scores by a constant as small as 1: only minus infinity removes them.",
        ),
    ),
    hints=("scores.masked_fill(~mask, float('-inf')) before the softmax.",),
)

# --- Section 3: rotary positions -----------------------------------------------------------------------------------


def _rope_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    late = torch.tensor([3, 4, 50, 51, 52, 200, 201])
    return [
        Case((_normal(generator, 2, 3, 5, 8), *rope_tables(torch.arange(5), 8)), name="positions 0 to 4"),
        Case((_normal(generator, 1, 2, 7, 12), *rope_tables(late, 12, 500.0)), name="positions 3 to 201"),
    ]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :half], sin[:, :half]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _no_minus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


ROPE = Exercise(
    id="rope",
    title="Rotary positions",
    points=3,
    reference=apply_rope,
    cases=_rope_cases,
    mutants=(
        Mutant(
            "interleaved",
            _interleaved,
            "You seem to pair neighboring channels (0, 1), (2, 3) as the paper does: here the pair of channel i is "
            "channel i + C/2, as in Hugging Face's Llama.",
        ),
        Mutant(
            "backwards",
            lambda x, cos, sin: _rotate(x, cos, -sin),
            "You seem to rotate by minus the angle: the first half becomes first * cos - second * sin.",
        ),
        Mutant(
            "reflection",
            _no_minus,
            "You seem to have lost a minus sign: with +sin in both halves the map is no rotation and changes the norm.",
        ),
        Mutant(
            "cos-and-sin-swapped",
            lambda x, cos, sin: _rotate(x, sin, cos),
            "You seem to have exchanged cos and sin: at position 0 the angle is 0 and nothing should change.",
        ),
        Mutant(
            "halves-not-swapped",
            lambda x, cos, sin: x * cos + x * sin,
            "You seem to add x * sin to itself: the sine multiplies the *other* channel of the pair.",
        ),
    ),
    atol=1e-5,
    hints=(
        "Split x into two halves a and b; the result is the concatenation of a cos - b sin and b cos + a sin.",
    ),
)

# --- Section 4: grouped heads and the memory of keys and values ----------------------------------------------------


def _repeat_cases(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (_normal(generator, 2, 3, 5, 4), 2),
        (_normal(generator, 1, 2, 6, 7), 4),
    ]


REPEAT_KV = Exercise(
    id="repeat_kv",
    title="Key heads for every query head",
    points=1,
    reference=repeat_kv,
    cases=_repeat_cases,
    mutants=(
        Mutant(
            "tiled",
            lambda x, groups: x.repeat(1, groups, 1, 1),
            "You seem to tile the heads 0 1 2 0 1 2: neighboring query heads share a key head, 0 0 1 1 2 2, so "
            "repeat each head in place.",
        ),
        Mutant(
            "time-axis",
            lambda x, groups: x.repeat_interleave(groups, dim=2),
            "You seem to repeat along time: the heads are axis 1.",
        ),
        Mutant(
            "head-count",
            lambda x, groups: x.repeat_interleave(x.shape[1], dim=1),
            "You seem to repeat as many times as there are key heads: repeat `groups` times, H / K.",
        ),
    ),
    hints=("torch.repeat_interleave, or view + expand + reshape with a new axis after the heads.",),
)


def _kv_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1000, 9000, (1,), generator=generator))
    return [
        Case((5, 3, 64, tokens, 7, 2), name="5 layers, K = 3, bf16"),
        Case((32, 8, 128, 8192, 1, 2), name="32 layers, K = 8, C = 128, bf16"),
        Case((2, 1, 16, 10, 3, 4), name="2 layers, K = 1, fp32"),
    ]


def _kv_reference(
    n_layers: int, n_kv_heads: int, d_head: int, tokens: int, batch: int, bytes_per_number: int
) -> int:
    config = ModelConfig(
        vocab_size=2, n_layers=n_layers, n_heads=n_kv_heads, n_kv_heads=n_kv_heads, d_head=d_head
    )
    return kv_cache_bytes(config, tokens, batch, bytes_per_number)


KV_BYTES = Exercise(
    id="kv_bytes",
    title="Bytes of the key/value cache",
    points=1,
    reference=_kv_reference,
    cases=_kv_cases,
    mutants=(
        Mutant(
            "keys-only",
            lambda n_layers, k, c, tokens, batch, size: n_layers * k * c * tokens * batch * size,
            "You seem to count one tensor: keys and values are both kept, a factor of 2.",
        ),
        Mutant(
            "one-layer",
            lambda n_layers, k, c, tokens, batch, size: 2 * k * c * tokens * batch * size,
            "You seem to count one layer: every layer keeps its own keys and values.",
        ),
        Mutant(
            "numbers-not-bytes",
            lambda n_layers, k, c, tokens, batch, size: 2 * n_layers * k * c * tokens * batch,
            "You seem to count numbers: multiply by the bytes of each.",
        ),
        Mutant(
            "one-sequence",
            lambda n_layers, k, c, tokens, batch, size: 2 * n_layers * k * c * tokens * size,
            "You seem to count one sequence: the whole batch is kept.",
        ),
        Mutant(
            "squared",
            lambda n_layers, k, c, tokens, batch, size: 2 * n_layers * k * c * tokens**2 * batch * size,
            "You seem to count the (T, T) weights: those are not kept, and the cache grows linearly with the tokens.",
        ),
    ),
    hints=("Two tensors of (B, K, T, C) numbers in every layer.",),
)

# --- Section 5: the layers of a block ------------------------------------------------------------------------------


def _norm_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    shifted = 3.0 + 2.0 * _normal(generator, 2, 5, 6)
    small = 0.05 * _normal(generator, 4, 9)
    half = (300.0 * _normal(generator, 3, 16)).half()
    return [
        Case((shifted, 1.0 + 0.3 * _normal(generator, 6), 1e-5), name="mean 3, width 6"),
        Case((small, 1.0 + 0.3 * _normal(generator, 9), 0.01), name="small values, eps = 0.01"),
        Case((half, torch.ones(16).half(), 1e-5), name="float16, values of some hundreds"),
    ]


def _norm_compare(expected: Tensor, got: Any) -> str | None:
    # Rounding before or after the gain differs by one unit in the last place of float16, 2^-11 relative.
    return difference(expected, got, rtol=2e-3 if expected.dtype == torch.float16 else 1e-5, atol=1e-6)


def _in_half(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps))


def _norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return weight * (x.float() * scale).to(x.dtype)


RMS_NORM = Exercise(
    id="rms_norm",
    title="RMSNorm",
    points=2,
    reference=rms_norm,
    cases=_norm_cases,
    mutants=(
        Mutant(
            "layer-norm",
            lambda x, w, eps: F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * w,
            "You seem to subtract the mean, which is LayerNorm: RMSNorm only divides by the root mean square.",
        ),
        Mutant(
            "no-root",
            lambda x, w, eps: _norm(x, w, 1 / (x.float().pow(2).mean(-1, keepdim=True) + eps)),
            "You seem to divide by the mean square: take its square root.",
        ),
        Mutant(
            "sum",
            lambda x, w, eps: _norm(x, w, torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + eps)),
            "You seem to divide by the length of the vector: take the mean of the squares, not their sum.",
        ),
        Mutant(
            "eps-outside",
            lambda x, w, eps: _norm(x, w, 1 / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps)),
            "You seem to add eps after the square root: it is added to the mean square, inside it.",
        ),
        Mutant(
            "no-gain",
            lambda x, w, eps: _norm(
                x, torch.ones_like(w), torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
            ),
            "You seem to have left out the gain: multiply by `weight`.",
        ),
        Mutant(
            "half-precision",
            _in_half,
            "You seem to square in float16: values above 255 overflow to infinity and the result is 0. Take the mean "
            "square of x.float().",
        ),
    ),
    compare=_norm_compare,
    hints=(
        "Multiply x.float() by rsqrt of (its mean square over the last axis + eps), cast back, times weight.",
    ),
)


def _swiglu_cases(seed: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (((2, 3, 5), 7), ((4, 6), 10))
    return [
        (
            _normal(generator, *shape),
            _normal(generator, d_ff, shape[-1]),
            _normal(generator, d_ff, shape[-1]),
            _normal(generator, shape[-1], d_ff),
        )
        for shape, d_ff in shapes
    ]


SWIGLU = Exercise(
    id="swiglu",
    title="The gated feed-forward layer",
    points=2,
    reference=swiglu,
    cases=_swiglu_cases,
    mutants=(
        Mutant(
            "gate-and-up-swapped",
            lambda x, gate, up, down: swiglu(x, up, gate, down),
            "You seem to apply SiLU to the `up` branch: it belongs on the `gate` branch. The model would train as "
            "well, but would not read a published checkpoint.",
        ),
        Mutant(
            "sigmoid",
            lambda x, gate, up, down: ((x @ gate.mT).sigmoid() * (x @ up.mT)) @ down.mT,
            "You seem to gate with the sigmoid, which is GLU: SiLU is z * sigmoid(z).",
        ),
        Mutant(
            "gelu",
            lambda x, gate, up, down: (F.gelu(x @ gate.mT) * (x @ up.mT)) @ down.mT,
            "You seem to gate with GELU, which is GEGLU: this family gates with SiLU.",
        ),
        Mutant(
            "no-gate",
            lambda x, gate, up, down: F.silu(x @ up.mT) @ down.mT,
            "You seem to have left out the gate: multiply two projections, SiLU on one of them.",
        ),
        Mutant(
            "sum",
            lambda x, gate, up, down: (F.silu(x @ gate.mT) + x @ up.mT) @ down.mT,
            "You seem to add the branches: they are multiplied element by element.",
        ),
        Mutant(
            "gate-after-product",
            lambda x, gate, up, down: F.silu((x @ gate.mT) * (x @ up.mT)) @ down.mT,
            "You seem to apply SiLU to the product: apply it to the gate branch, then multiply.",
        ),
    ),
    rtol=1e-4,
    atol=1e-4,
    hints=(
        "F.linear(x, W) is x W^T. Two projections to F, SiLU on the gate's, product, projection back to D.",
    ),
)


def _block_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for tokens in (5, 2):
        block = Block(ModelConfig(vocab_size=3, d_model=12, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=20))
        for parameter in block.parameters():  # gains unlike 1, so that a norm left out or used twice shows
            parameter.data = 0.7 * _normal(generator, *parameter.shape)
        cases.append(Case((2.0 * _normal(generator, 2, tokens, 12), block), name=f"{tokens} tokens"))
    return cases


def _run_block(answer: Any, case: Case) -> Tensor:
    x, block = case.args
    cos, sin = rope_tables(torch.arange(x.shape[1]), block.attention.d_head)
    if answer is Block.forward:
        return block(x, cos, sin)
    return answer(x, block.attention_norm, lambda y: block.attention(y, cos, sin), block.mlp_norm, block.mlp)


def _pre_norm(x: Tensor, norm_1: Any, attention: Any, norm_2: Any, mlp: Any) -> Tensor:
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


def _post_norm(x: Tensor, norm_1: Any, attention: Any, norm_2: Any, mlp: Any) -> Tensor:
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


def _no_residual(x: Tensor, norm_1: Any, attention: Any, norm_2: Any, mlp: Any) -> Tensor:
    return mlp(norm_2(attention(norm_1(x))))


def _residual_from_norm(x: Tensor, norm_1: Any, attention: Any, norm_2: Any, mlp: Any) -> Tensor:
    x = norm_1(x)
    x = norm_2(x + attention(x))
    return x + mlp(x)


BLOCK = Exercise(
    id="block",
    title="The pre-norm block",
    points=2,
    reference=Block.forward,
    cases=_block_cases,
    run=_run_block,
    mutants=(
        Mutant(
            "post-norm",
            _post_norm,
            "You seem to normalize after the addition (post-norm, the layout of 2017): here the norm stands inside "
            "the branch, x + f(norm(x)), and the stream itself is never normalized.",
        ),
        Mutant(
            "no-residual",
            _no_residual,
            "You seem to have dropped the residual: each branch is added to x.",
        ),
        Mutant(
            "residual-from-norm",
            _residual_from_norm,
            "You seem to add the branch to the normalized x: norm(x) feeds the branch only, the sum uses x itself.",
        ),
        Mutant(
            "parallel",
            lambda x, norm_1, attention, norm_2, mlp: x + attention(norm_1(x)) + mlp(norm_2(x)),
            "You seem to feed both branches from the block's input (GPT-J's parallel block): the feed-forward layer "
            "reads the stream after attention has written to it.",
        ),
        Mutant(
            "one-norm",
            lambda x, norm_1, attention, norm_2, mlp: _pre_norm(x, norm_1, attention, norm_1, mlp),
            "You seem to use the attention's norm twice: the feed-forward branch has its own.",
        ),
        Mutant(
            "norm-of-branch",
            lambda x, norm_1, attention, norm_2, mlp: _pre_norm(x, attention, norm_1, mlp, norm_2),
            "You seem to normalize what the branch returns: normalize what it reads, f(norm(x)).",
        ),
    ),
    rtol=1e-4,
    atol=1e-4,
    hints=("Two lines: x = x + attention(attention_norm(x)), then the same with the feed-forward layer.",),
)

EXERCISES: list[Exercise] = [LOOKUP, MASK, MASKED, ROPE, REPEAT_KV, KV_BYTES, RMS_NORM, SWIGLU, BLOCK]
