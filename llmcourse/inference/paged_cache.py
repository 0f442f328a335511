"""The paged key/value cache: one pool of blocks for all sequences, and the view of it that a forward pass gets.

A contiguous cache sets aside the longest possible text for every row. Here a row owns the blocks that its tokens fill,
so memory is lost only in the last block of each (Kwon et al., 2023, "PagedAttention"). Without a kernel that reads
blocks where they lie, attention first gathers a row's blocks into one piece; the pool is laid out for that.

Shapes: N blocks, P block_size, B rows, T new tokens of the longest row, S slots that the longest row sees, K key/value
heads, C d_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.models.config import ModelConfig

CACHE_DTYPES = ("model", "int8")
FEWEST = 16
"""rows that a part of similar lengths must have before another one is begun"""
SHORT = 32
"""new tokens of a row up to which `FlatView` lets each attend as a row of its own"""


@dataclass(frozen=True)
class Row:
    """What a forward pass needs to know of a sequence."""

    blocks: list[int]
    n_stored: int
    """tokens whose keys and values are in the blocks"""
    n_new: int
    """tokens that this pass computes"""

    @property
    def end(self) -> int:
        """Tokens after the pass."""
        return self.n_stored + self.n_new


class PagedCache:
    """Keys and values of all layers in one pool of `n_blocks` blocks.

    With `quantized`, the numbers of each token, head and side are stored as int8 with one scale, their largest
    magnitude over 127: about a quarter of the bytes of float32. They are multiplied out when they are read.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_size: int,
        *,
        quantized: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.block_size, self.quantized = config, block_size, quantized
        shape = (n_blocks, block_size, 2 * config.n_kv_heads, config.d_head)
        stored = torch.int8 if quantized else dtype
        self.layers = [torch.zeros(shape, device=device, dtype=stored) for _ in range(config.n_layers)]
        self.scales = [
            torch.zeros((*shape[:-1], 1), device=device, dtype=dtype)
            for _ in range(config.n_layers if quantized else 0)
        ]

    @property
    def bytes(self) -> int:
        """Size of the pool."""
        return sum(tensor.nbytes for tensor in (*self.layers, *self.scales))

    def view(self, rows: Sequence[Row]) -> PagedView:
        """The cache as a forward pass over these rows sees it."""
        return PagedView(self, rows)

    def flat_view(self, rows: Sequence[Row]) -> FlatView:
        """The cache as a pass sees it that has all rows one behind the other."""
        return FlatView(self, rows)

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        """Store values (M, 2 K, C) in slots (M,) int64 of a layer; slot s is place s % P of block s // P."""
        if self.quantized:
            scale = (values.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-12)  # (M, 2 K, 1)
            self.scales[layer].flatten(0, 1).index_copy_(0, slots, scale.to(self.scales[layer].dtype))
            values = (values / scale).round()
        pool = self.layers[layer]
        pool.flatten(0, 1).index_copy_(0, slots, values.to(pool.dtype))

    def read(self, layer: int, blocks: Tensor) -> Tensor:
        """The content of blocks (B, N') int64 in one piece: (B, N' P, 2 K, C)."""
        B, n = blocks.shape
        found = self.layers[layer].index_select(0, blocks.flatten())  # (B N', P, 2 K, C)
        if self.quantized:
            scale = self.scales[layer].index_select(0, blocks.flatten())
            found = found.to(scale.dtype) * scale
        return found.view(B, n * self.block_size, 2 * self.config.n_kv_heads, self.config.d_head)


class PagedView:
    """Passed as a model's `cache`: rows of different lengths, each with its stored and its new tokens.

    The new tokens of shorter rows are filled up at the end; what the model computes there is stored nowhere and must
    not be used. `last` (B,) says where the last real token of each row stands.
    """

    length = 0

    def __init__(self, cache: PagedCache, rows: Sequence[Row]) -> None:
        self.cache, device = cache, cache.layers[0].device
        stored = [row.n_stored for row in rows]
        self.n_new = max(row.n_new for row in rows)
        # the model asks whether `longest` and the new tokens fit its context: no row may pass it
        self.longest = max(row.n_stored + row.n_new for row in rows) - self.n_new
        self.last = torch.tensor([row.n_new - 1 for row in rows], device=device)
        P = cache.block_size
        self._visible = max(row.n_stored + row.n_new for row in rows)  # S
        n_blocks = -(-self._visible // P)
        tables = [row.blocks[:n_blocks] + [0] * (n_blocks - len(row.blocks)) for row in rows]
        self._tables = torch.tensor(tables, device=device)  # (B, S / P)
        self._stored = torch.tensor(stored, device=device)
        self._slots = torch.tensor(
            [
                row.blocks[t // P] * P + t % P
                for row in rows
                for t in range(row.n_stored, row.n_stored + row.n_new)
            ],
            device=device,
        )  # of the real new tokens, row by row
        is_real = torch.arange(self.n_new, device=device) <= self.last[:, None]  # (B, T)
        self._real = (
            None if all(row.n_new == self.n_new for row in rows) else is_real.flatten().nonzero()[:, 0]
        )

    def positions(self, n_tokens: int) -> Tensor:
        """Where each new token stands in its text, (B, T) int64; filled-up ones stay inside of the context."""
        places = self._stored[:, None] + torch.arange(n_tokens, device=self._stored.device)
        return places.clamp(max=self.cache.config.context_length - 1)

    def mask(self, n_tokens: int) -> Tensor:
        """Boolean (B, 1, T, S): every token sees its row up to itself."""
        slots = torch.arange(self._visible, device=self._stored.device)
        places = self._stored[:, None] + torch.arange(n_tokens, device=self._stored.device)  # (B, T)
        return (slots <= places[..., None])[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) of the new tokens; return what each row has, stored and new, (B, K, S, C) each."""
        K = keys.shape[1]
        new = torch.cat((keys, values), dim=1).transpose(1, 2).flatten(0, 1)  # (B T, 2 K, C)
        self.cache.write(layer, self._slots, new if self._real is None else new[self._real])
        found = self.cache.read(layer, self._tables)[:, : self._visible].transpose(1, 2)  # (B, 2 K, S, C)
        return found[:, :K], found[:, K:]

    def advance(self, n_tokens: int) -> None:
        """The engine counts what is stored."""


class FlatView:
    """Passed as a cache to a model that knows `attend`: the new tokens of all rows stand behind one another in one row.

    So prompts and single tokens share every matrix product without filling up, and only attention looks at each text by
    itself (Yu et al., 2022, section 3.2, "selective batching"). Each token of a short row attends as a row of its own,
    which costs a few reads of the same blocks and saves a call; rows of more than `SHORT` tokens attend one by one, and
    have to come last. `last` (rows,) says where the last new token of each row stands.

    Raises:
        ValueError: a short row behind a long one.
    """

    length = 0

    def __init__(self, cache: PagedCache, rows: Sequence[Row]) -> None:
        n_short = sum(row.n_new <= SHORT for row in rows)
        if any(row.n_new > SHORT for row in rows[:n_short]):
            raise ValueError(f"rows of more than {SHORT} new tokens come last")
        groups = _by_length(rows[:n_short], cache.block_size) + [[row] for row in rows[n_short:]]
        self.parts = [cache.view(group) for group in groups]
        self._masks = [part.mask(part.n_new) for part in self.parts]
        self._sizes = [len(part.last) * part.n_new for part in self.parts]
        new = torch.tensor([row.n_new for row in rows], device=cache.layers[0].device)
        self.last = new.cumsum(dim=0) - 1

    def positions(self, n_tokens: int) -> Tensor:
        """Where each new token stands in its text, (1, all new tokens) int64."""
        return torch.cat([part.positions(part.n_new).flatten() for part in self.parts])[None]

    def mask(self, n_tokens: int) -> None:
        """`attend` has masks of its own."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, N, C), k and v (1, K, N, C) of all N new tokens -> what each of them attends to, (1, H, N, C)."""
        if len(self.parts) == 1:
            return self._attend(0, layer, q, k, v)
        pieces = zip(*(x.split(self._sizes, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(i, layer, *piece) for i, piece in enumerate(pieces)], dim=2)

    def _attend(self, number: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part, K = self.parts[number], k.shape[1]
        # (1, heads, rows T, C) -> (rows, heads, T, C)
        q, k, v = (x[0].unflatten(1, (-1, part.n_new)).transpose(0, 1) for x in (q, k, v))
        keys, values = part.update(layer, k, v)
        if part.n_new == 1:
            # the query heads of a key head stand where several queries would: faster than to repeat the keys
            grouped = q.squeeze(2).unflatten(1, (K, -1))  # (rows, K, G, C)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._masks[number])
            return mixed.flatten(1, 2).transpose(0, 1)[None]
        mixed = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._masks[number], enable_gqa=q.shape[1] != K
        )
        return mixed.transpose(0, 1).flatten(1, 2)[None]

    def advance(self, n_tokens: int) -> None:
        """The engine counts what is stored."""


def _by_length(rows: Sequence[Row], block_size: int) -> list[list[Row]]:
    """Short rows, taken apart into single tokens, in parts of similar lengths: a part reads as many blocks for each of
    its rows as the longest one has. A part of its own costs some calls, so it takes `FEWEST` rows to be worth it."""
    parts: list[list[Row]] = []
    limit = 0
    for row in rows:
        n_blocks = -(-row.end // block_size)
        if not parts or (n_blocks > limit and len(parts[-1]) >= FEWEST):
            parts.append([])
            limit = 2 * n_blocks
        parts[-1] += [Row(row.blocks, t, 1) for t in range(row.n_stored, row.end)]
    return parts
