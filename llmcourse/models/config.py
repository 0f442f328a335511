"""Shape of a dense decoder of the Llama family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the architecture and its parameter count.

    The family is Llama's (Touvron et al., 2023): pre-norm RMSNorm, rotary positions, grouped-query attention,
    SwiGLU, no biases. `qk_norm=True` adds the per-head RMSNorm of queries and keys of Qwen3 (Yang et al., 2025).

    Raises:
        ValueError: a size is not positive, `n_heads` is not a multiple of `n_kv_heads`, or `d_head` is odd
            (rotary embeddings turn pairs of channels).
    """

    vocab_size: int
    """number of token ids, V"""
    context_length: int = 256
    """longest sequence in tokens that the model is trained on, T"""
    d_model: int = 128
    """width of the residual stream, D"""
    n_layers: int = 4
    """number of blocks"""
    n_heads: int = 4
    """query heads per layer, H"""
    n_kv_heads: int = 2
    """key and value heads per layer, K; equal to `n_heads` is multi-head, 1 is multi-query attention"""
    d_head: int | None = None
    """channels per head, C; `None` means d_model / n_heads"""
    d_ff: int = 384
    """hidden width of the feed-forward layer, F"""
    rope_theta: float = 10_000.0
    """base of the rotary wavelengths"""
    norm_eps: float = 1e-5
    """added to the mean square inside RMSNorm"""
    tie_embeddings: bool = True
    """one matrix for the token embedding and the output head"""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation"""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta}: give a positive number, such as 10000")
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps={self.norm_eps}: give 0 or more, such as 1e-5")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}: each key head "
                "serves the same number of query heads, so choose a divisor"
            )
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: change one, or set d_head"
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.d_head < 1:
            raise ValueError(f"d_head={self.d_head}: give a positive number, or None for d_model / n_heads")
        if self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd: rotary embeddings need pairs of channels")
