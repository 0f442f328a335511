"""The decoder: embedding, a stack of pre-norm blocks, a final norm and the output head.

Shapes: B batch, T time, D d_model, V vocab_size, C d_head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmcourse.models.attention import Attention, Cache, RMSNorm, SwiGLU, rope_tables
from llmcourse.models.config import ModelConfig


class Block(nn.Module):
    """x + Attention(norm(x)), then x + SwiGLU(norm(x)): the residual stream is only added to (Xiong et al., 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); see `Attention.forward` for the rest."""
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A causal language model of the Llama family; `config` says which.

    Weights start as N(0, 1 / D), which keeps the variance of a D-wide input, and the two matrices of a block that
    write into the residual stream as N(0, 1 / (2 n_layers D)), so that its variance does not grow with depth (Radford
    et al., 2019, section 2.3). Embeddings start as N(0, 9 / D): a token's identity must not drown in what the first
    blocks add to it. With embeddings at 0.02, one-seed trials of the cpu preset's width on stories alone made no use of
    their context after 1.2 to 2.5 million tokens; from 0.08 upwards they did within 1.2 million.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(torch.arange(config.context_length), config.d_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (context_length, C)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.d_model**-0.5
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, Block):  # `apply` visits children first, so this overrides the line above
            for matrix in (module.attention.output.weight, module.mlp.down.weight):
                nn.init.normal_(matrix, std=std / math.sqrt(2 * self.config.n_layers))
        if module is self:
            nn.init.normal_(self.embedding.weight, std=3 * std)

    def rope(self, n_tokens: int, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Rotary tables of the next `n_tokens` positions, (T, C), or (B, 1, T, C) when rows start apart."""
        index = None if cache is None else cache.positions(n_tokens)  # (B, T)
        if index is not None:
            return self.cos[index].unsqueeze(1), self.sin[index].unsqueeze(1)
        start = 0 if cache is None else cache.length
        return self.cos[start : start + n_tokens], self.sin[start : start + n_tokens]

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> normalized final residual stream (B, T, D), what the head reads.

        Raises:
            ValueError: stored and new tokens together exceed `context_length`.
        """
        T = tokens.shape[1]
        end = T + (0 if cache is None else cache.longest)
        if end > self.config.context_length:
            raise ValueError(
                f"{end} tokens exceed the context of {self.config.context_length}: shorten the input or raise "
                "context_length when the model is made"
            )
        cos, sin = self.rope(T, cache)
        mask = None if cache is None else cache.mask(T)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, layer, mask)
        if cache is not None:
            cache.advance(T)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V). Position t's logits are for token t + 1 and see tokens <= t."""
        return self.head(self.hidden_states(tokens, cache))
