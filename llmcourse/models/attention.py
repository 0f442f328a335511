"""Attention and the other layers of a block, each as a pure function and as the module that uses it.

Shapes: B batch, T time, D d_model, H query heads, K key/value heads, G = H / K, C d_head, F d_ff.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.models.config import ModelConfig


class Cache(Protocol):
    """What the model asks of a key/value cache; `llmcourse.inference` provides them, so models need not know which."""

    length: int
    """slots filled in each row, padding included, before the present call"""
    longest: int
    """tokens of the longest row, before the present call"""

    def positions(self, n_tokens: int) -> Tensor | None:
        """Positions (B, T) int64 of the next `n_tokens`; `None` if every row goes on at `length`."""
        ...

    def mask(self, n_tokens: int) -> Tensor | None:
        """Boolean (B or 1, 1, T_query, T_total), True = may attend; `None` if every query may see every key."""
        ...

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, C) keys and values of `layer`; return all of that layer, (B, K, T_total, C)."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count the tokens as stored, once all layers have been updated."""
        ...


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square normalization over the last axis (Zhang and Sennrich, 2019, eq. 4).

    x (..., D), weight (D,) -> (..., D) in x's dtype. No mean is subtracted; the mean square is taken in float32.
    """
    x32 = x.float()
    inverse_rms = torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight * (x32 * inverse_rms).to(x.dtype)


def rope_frequencies(d_head: int, theta: float = 10_000.0) -> Tensor:
    """Angular frequency in radians per position of each channel pair: theta^(-2i/C), i = 0 .. C/2 - 1.

    Returns (C/2,) float32 (Su et al., 2021, section 3.2.2).
    """
    return theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


def rope_tables(positions: Tensor, d_head: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: positions (T,) -> two tensors (T, C), both halves alike."""
    angles = positions.float()[:, None] * rope_frequencies(d_head, theta).to(positions.device)  # (T, C/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, C)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel pair (i, i + C/2) by its position's angle: x (B, H, T, C), tables (T, C) -> (B, H, T, C).

    The two channels of a pair lie half a head apart ("half-split", as in GPT-NeoX and in Hugging Face's Llama); the
    paper's layout interleaves them. The two differ by a permutation of the rows of W_q and W_k.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """Boolean (T_query, T_key), True where query i may attend to key j.

    The queries are the last `n_queries` of the `n_keys` positions, so i sees j <= i + T_key - T_query.
    """
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(diagonal=n_keys - n_queries)


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Give every query head its key head: (B, K, T, C) -> (B, K * groups, T, C).

    Head k serves the query heads k * groups .. (k + 1) * groups - 1 (Ainslie et al., 2023).
    """
    return x.repeat_interleave(groups, dim=1)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V, written out (Vaswani et al., 2017, eq. 1).

    q (B, H, Tq, C), k and v (B, H, Tk, C), mask boolean (Tq, Tk), True = may attend -> (B, H, Tq, C).
    This is the study version; `Attention` goes through `causal_attention`, which picks the kernel for the device.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def blocked_causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal attention a block of queries at a time, so that the masked upper triangle is mostly never computed.

    q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C), equal to `scaled_dot_product_attention` under a causal mask.
    Plain matrix products in the inputs' dtype: on CPUs that multiply bfloat16 in hardware, forward and backward
    together take less than half the time of torch's fused CPU kernel, at the price of storing the weights.
    """
    B, H, T, C = q.shape
    K = k.shape[1]
    q = (q * C**-0.5).view(B, K, H // K, T, C)  # the G query heads of a key head share one product
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        n = end - start
        scores = q[:, :, :, start:end].reshape(B * K, -1, C) @ k[:, :, :end].reshape(B * K, end, C).transpose(
            1, 2
        )
        bias = torch.zeros(n, end, dtype=scores.dtype, device=q.device)
        bias.masked_fill_(~causal_mask(n, end, q.device), float("-inf"))
        weights = (scores.view(B * K, -1, n, end) + bias).softmax(dim=-1).to(v.dtype)  # (B K, G, n, end)
        mixed = weights.view(B * K, -1, end) @ v[:, :, :end].reshape(B * K, end, C)
        outputs.append(mixed.view(B, K, H // K, n, C))
    return torch.cat(outputs, dim=3).view(B, H, T, C)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole sequence with the fastest kernel for the device: see `blocked_causal_attention`.

    q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C).
    """
    if q.device.type == "cpu" and q.shape[2] > 32:
        return blocked_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(SiLU(x W_gate^T) * x W_up^T) W_down^T (Shazeer, 2020, eq. 6, without biases).

    x (..., D), gate and up (F, D), down (D, F) -> (..., D).
    """
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain of shape (D,), initially 1."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The gated feed-forward layer: three matrices, no bias."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.query = nn.Linear(config.d_model, self.n_heads * self.d_head, bias=False)
        self.key = nn.Linear(config.d_model, self.n_kv_heads * self.d_head, bias=False)
        self.value = nn.Linear(config.d_model, self.n_kv_heads * self.d_head, bias=False)
        self.output = nn.Linear(self.n_heads * self.d_head, config.d_model, bias=False)
        self.query_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.d_head, config.norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate: x (B, T, D) -> q (B, H, T, C), k and v (B, K, T, C)."""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.n_heads, self.d_head)
        k = self.key(x).view(B, T, self.n_kv_heads, self.d_head)
        v = self.value(x).view(B, T, self.n_kv_heads, self.d_head)
        q = apply_rope(self.query_norm(q).transpose(1, 2), cos, sin)
        k = apply_rope(self.key_norm(k).transpose(1, 2), cos, sin)
        return q, k, v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D), tables (T, C) or (B, 1, T, C) -> (B, T, D).

        With a cache, x holds only the new tokens; they attend to everything stored before and, as `mask` says, to one
        another.
        """
        B, T, _ = x.shape
        q, k, v = self.heads(x, cos, sin)
        if cache is None:
            mixed = causal_attention(q, k, v)  # (B, H, T, C)
        else:
            k, v = cache.update(layer, k, v)
            grouped = self.n_heads != self.n_kv_heads
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.output(mixed.transpose(1, 2).reshape(B, T, self.n_heads * self.d_head))
