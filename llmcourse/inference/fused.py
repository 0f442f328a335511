"""The model's forward pass in fewer operations, for decoding.

A decode step of a small model does little arithmetic: its time is the number of operations launched. So the
projections that read the same input become one product (query, key and value; gate and up), the products that write
into the residual stream add to it in the same call, queries and keys are rotated together, and RMSNorm takes three
operations, its gain being part of the matrix behind it:

    RMSNorm(x) W^T = x / sqrt(|x|^2 / D + eps) diag(g) W^T = x / sqrt(|x|^2 + D eps) (sqrt(D) W diag(g))^T

Shapes: B rows, T new tokens, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse.models.attention import Attention, Cache, RMSNorm, SwiGLU
from llmcourse.models.transformer import Block, Transformer

LARGEST = 300_000_000
"""parameters; above it the copy of the weights costs more memory than the launches cost time"""
_KNOWN = (Transformer, Block, Attention, SwiGLU, RMSNorm, nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList)


@dataclass(frozen=True, eq=False)
class _Layer:
    """The weights of a block as decoding wants them: transposed, with the gains of the norms before them."""

    query_key_value: Tensor  # (D, (H + 2 K) C)
    query_gain: Tensor | None  # (C,), of the norm of the query heads
    key_gain: Tensor | None  # (C,)
    output: Tensor  # (H C, D)
    gate_up: Tensor  # (D, 2 F)
    down: Tensor  # (F, D)


def can_fuse(model: nn.Module) -> bool:
    """Whether `FusedTransformer` computes what `model` computes.

    It reads weights and not modules, so nothing may be replaced (adapters, quantized layers) or hooked.
    """
    if not isinstance(model, Transformer) or sum(p.numel() for p in model.parameters()) > LARGEST:
        return False
    return all(type(module) in _KNOWN and not _is_altered(module) for module in model.modules())


def _is_altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class FusedTransformer:
    """A copy of a model's weights, arranged for decoding; it does not follow later changes of the model.

    Raises:
        ValueError: the model has replaced or hooked modules, or is too large to copy: see `can_fuse`.
    """

    def __init__(self, model: Transformer) -> None:
        if not can_fuse(model):
            raise ValueError(
                "the model has replaced or hooked modules, or is too large to copy: use it as it is"
            )
        self.config = model.config
        self.embedding = model.embedding.weight  # (V, D)
        self.head = _behind(model.final_norm, model.head.weight)  # (D, V)
        self.layers = [_fuse(block) for block in model.blocks]
        half = model.config.d_head // 2
        self.cos = model.cos  # (context_length, C)
        self.sin = torch.cat((-model.sin[:, :half], model.sin[:, half:]), dim=1)  # the signs of "rotate half"
        eps = torch.tensor(model.config.norm_eps, device=self.embedding.device, dtype=torch.float32)
        self._floor, self._head_floor = (
            (eps * model.config.d_model).sqrt(),
            (eps * model.config.d_head).sqrt(),
        )

    def logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens (B, T) int64, new ones only -> logits (B, V) after the last of them."""
        return self.unembed(self.hidden(tokens, cache)[:, -1])

    def unembed(self, x: Tensor) -> Tensor:
        """The residual stream (.., D) -> logits (.., V)."""
        return _normalize(x, self._floor) @ self.head

    def hidden(self, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens (B, T) int64, new ones only -> residual stream behind the last block (B, T, D), before its norm."""
        B, T = tokens.shape
        rope, mask = self._rope(T, cache), cache.mask(T)
        x = F.embedding(tokens.reshape(-1), self.embedding)  # (B T, D)
        for number, layer in enumerate(self.layers):
            heads = (_normalize(x, self._floor) @ layer.query_key_value).view(B, T, -1, self.config.d_head)
            mixed = self._attention(number, layer, heads.transpose(1, 2), rope, cache, mask)
            x = torch.addmm(x, mixed, layer.output)
            gate, up = (_normalize(x, self._floor) @ layer.gate_up).chunk(2, dim=-1)  # (B T, F)
            x = torch.addmm(x, F.silu(gate) * up, layer.down)
        cache.advance(T)
        return x.view(B, T, -1)

    def _rope(self, n_tokens: int, cache: Cache) -> tuple[Tensor, Tensor]:
        """Tables of the new positions, (T, C), or (B, 1, T, C) when rows start apart."""
        index = cache.positions(n_tokens)
        if index is not None:
            return self.cos[index].unsqueeze(1), self.sin[index].unsqueeze(1)
        end = cache.length + n_tokens
        return self.cos[cache.length : end], self.sin[cache.length : end]

    def _attention(
        self,
        number: int,
        layer: _Layer,
        heads: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Cache,
        mask: Tensor | None,
    ) -> Tensor:
        """heads (B, H + 2 K, T, C): queries, keys, values -> (B T, H C), the heads' outputs side by side."""
        H, K, C = self.config.n_heads, self.config.n_kv_heads, self.config.d_head
        turning, values = heads.split((H + K, K), dim=1)
        if layer.query_gain is not None:
            q, k = _normalize(turning, self._head_floor).split((H, K), dim=1)
            turning = torch.cat((q * layer.query_gain, k * layer.key_gain), dim=1)
        cos, sin = rope
        turned = torch.addcmul(turning * cos, turning.roll(C // 2, dims=-1), sin)
        q, k = turned.split((H, K), dim=1)
        if hasattr(cache, "attend"):
            return cache.attend(number, q, k, values).transpose(1, 2).reshape(-1, H * C)
        k, v = cache.update(number, k, values)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
        return mixed.transpose(1, 2).reshape(-1, H * C)


def _normalize(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + floor^2) over the last axis: RMSNorm but for the factor sqrt(D) and the gain."""
    length = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return (x / torch.hypot(length, floor)).to(x.dtype)


def _behind(norm: RMSNorm, *matrices: Tensor) -> Tensor:
    """Matrices (.., D) that read the output of `norm`, side by side and transposed, with its gain and sqrt(D)."""
    stacked = torch.cat(matrices) * (norm.weight * norm.weight.shape[0] ** 0.5)
    return stacked.t().contiguous()


def _fuse(block: Block) -> _Layer:
    attention, mlp = block.attention, block.mlp
    scale = attention.d_head**0.5
    normed = isinstance(attention.query_norm, RMSNorm)
    return _Layer(
        query_key_value=_behind(
            block.attention_norm, attention.query.weight, attention.key.weight, attention.value.weight
        ),
        query_gain=attention.query_norm.weight * scale if normed else None,
        key_gain=attention.key_norm.weight * scale if normed else None,
        output=attention.output.weight.t().contiguous(),
        gate_up=_behind(block.mlp_norm, mlp.gate.weight, mlp.up.weight),
        down=mlp.down.weight.t().contiguous(),
    )
