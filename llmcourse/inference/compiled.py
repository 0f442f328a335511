"""A decode step of fixed shape for `torch.compile`, and with it for CUDA graphs.

A compiler specializes on shapes, and a graph replays the same kernels on the same addresses. So nothing may grow: the
cache has its full size from the start, the number of stored tokens is a tensor, and a mask hides the slots behind it.
The price is attention over all slots at every step.

Shapes: B rows, S slots, K key/value heads, C d_head, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcourse.inference.sampling import SamplingParams, sample
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer


class StaticCache:
    """Keys and values in buffers (B, K, S, C) that never change their shape; `filled` () int64 is a tensor.

    It serves rows of equal length, one new token at a time.
    """

    length = 0

    def __init__(
        self, config: ModelConfig, batch_size: int, slots: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, slots, config.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self.longest = 0
        self._slots = torch.arange(slots, device=device)
        self._batch_size = batch_size

    def positions(self, n_tokens: int) -> Tensor:
        """The place of the new tokens, (B, T) int64."""
        new = self.filled + torch.arange(n_tokens, device=self.filled.device)
        return new.expand(self._batch_size, n_tokens)

    def mask(self, n_tokens: int) -> Tensor:
        """Boolean (1, 1, T, S): the filled slots and, among the new ones, those not later."""
        return (self._slots <= self.positions(n_tokens)[:1, :, None])[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) behind what is there; return all slots, (B, K, S, C)."""
        places = self.positions(keys.shape[2])[0]
        self.keys[layer].index_copy_(2, places, keys)
        self.values[layer].index_copy_(2, places, values)
        return self.keys[layer], self.values[layer]

    def advance(self, n_tokens: int) -> None:
        """Count the tokens, in place."""
        self.filled += n_tokens


class CompiledDecoder:
    """Decodes `batch_size` rows of equal prompts' length with one compiled step.

    Args:
        model: its weights are read at every step, so later changes count.
        batch_size: rows.
        slots: prompt and new tokens of a row, at most the context.
        mode: of `torch.compile`; "reduce-overhead" captures CUDA graphs on a GPU; `None` does not compile.

    Raises:
        ValueError: more slots than the context holds.
    """

    def __init__(
        self, model: Transformer, batch_size: int, slots: int, *, mode: str | None = "default"
    ) -> None:
        if not 2 <= slots <= model.config.context_length:
            raise ValueError(f"slots={slots}: give 2 to {model.config.context_length}, the model's context")
        self.model, self.slots = model, slots
        weight = model.embedding.weight
        self.cache = StaticCache(model.config, batch_size, slots, device=weight.device, dtype=weight.dtype)
        self.step: Callable[[Tensor], Tensor] = self._step
        if mode is not None:
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    def _step(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1) -> logits (B, V)."""
        return self.model(tokens, self.cache)[:, -1]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """Continue prompts of one length; no row stops before `max_new_tokens`.

        Raises:
            ValueError: not as many prompts as rows, prompts of different lengths, or more tokens than slots.
        """
        lengths = {len(prompt) for prompt in prompts}
        rows = self.cache.keys.shape[1]
        if len(prompts) != rows or len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"{len(prompts)} prompts of {sorted(lengths)} tokens: give {rows} of one length")
        (length,) = lengths
        if length + params.max_new_tokens > self.slots:
            raise ValueError(
                f"{length} + {params.max_new_tokens} tokens: the decoder was made for {self.slots}"
            )
        self.cache.filled.zero_()
        generator = None
        if params.seed is not None:
            generator = torch.Generator(self.cache.filled.device).manual_seed(params.seed)
        tokens = torch.tensor(prompts, device=self.cache.filled.device)
        logits = self.model(tokens, self.cache)[:, -1]  # the prompt's shape differs, so it is not compiled
        written = []
        for number in range(params.max_new_tokens):
            chosen = sample(logits, params, generator)
            written.append(chosen)
            if number + 1 < params.max_new_tokens:
                logits = self.step(chosen[:, None])
        return torch.stack(written, dim=1).tolist()
