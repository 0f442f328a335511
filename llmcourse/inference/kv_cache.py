"""The contiguous key/value cache: what attention has already computed is stored, not computed again.

Shapes: B rows, K key/value heads, T tokens, C d_head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer in two buffers (n_layers, B, K, capacity, C), filled from the left.

    Rows of unequal prompts are padded on the left: `padding` (B,) int64 counts the slots of each row that hold no
    token. They are masked out, and positions count from the first real token. So `capacity` may exceed the context by
    the largest padding: a row must then leave (`keep_rows`) when its own tokens fill the context.

    Raises:
        ValueError: `capacity` is more than any row could use.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        padding: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self._count_shortest_padding()
        usable = config.context_length + (0 if self.padding is None else int(self.padding.max()))
        if capacity > usable:
            raise ValueError(
                f"capacity={capacity} exceeds the model's context of {config.context_length} tokens plus padding"
            )
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.capacity = 0, capacity
        self._list_layers()

    def _list_layers(self) -> None:
        # views made once: indexing a 5-d buffer at each update costs more than the copy of one token
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    def _count_shortest_padding(self) -> None:
        self._shortest_padding = 0 if self.padding is None else int(self.padding.min())

    @property
    def longest(self) -> int:
        """Tokens of the longest row; `length` counts slots, padding included."""
        return self.length - self._shortest_padding

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return self.keys.nbytes + self.values.nbytes

    def positions(self, n_tokens: int) -> Tensor | None:
        """Positions (B, n_tokens) of the next tokens; `None` when no row is padded, since all then go on at
        `length`."""
        if self.padding is None:
            return None
        slots = torch.arange(self.length, self.length + n_tokens, device=self.padding.device)
        return (slots[None] - self.padding[:, None]).clamp(min=0)

    def mask(self, n_tokens: int) -> Tensor | None:
        """Which slots each new token may attend to, (B or 1, 1, n_tokens, length + n_tokens); `None` for all of
        them."""
        if self.padding is None and n_tokens == 1:
            return None
        device, total = self.keys.device, self.length + n_tokens
        slots = torch.arange(total, device=device)
        queries = torch.arange(self.length, total, device=device)
        causal = (slots[None] <= queries[:, None])[None, None]  # (1, 1, Tq, Tk)
        if self.padding is None:
            return causal
        real = slots[None] >= self.padding[:, None]  # (B, Tk)
        # a padded query sees itself, so that its softmax has a term
        on_itself = slots[None] == queries[:, None]
        return causal & (real[:, None, None] | on_itself[None, None])

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) of `layer` behind what is there and return all of it, (B, K, length + T, C).

        Raises:
            ValueError: the buffers are full.
        """
        n_tokens = keys.shape[2]
        end = self.length + n_tokens
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit the cache of {self.capacity}: make it larger")
        stored_keys, stored_values = self._layers[layer]  # (B, K, capacity, C)
        stored_keys.narrow(2, self.length, n_tokens).copy_(keys)
        stored_values.narrow(2, self.length, n_tokens).copy_(values)
        return stored_keys.narrow(2, 0, end), stored_values.narrow(2, 0, end)

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` as stored."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` slots of each row, for example tokens that were only proposed.

        Raises:
            ValueError: more than is stored, or less than nothing.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"length={length}: the cache holds {self.length} tokens, give 0 to {self.length}"
            )
        self.length = length

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only the rows of these indices (n,), in this order: finished rows cost nothing more."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self._list_layers()
        if self.padding is not None:
            self.padding = self.padding[rows]
            self._count_shortest_padding()
