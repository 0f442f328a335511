"""Several documents in one row, none of which sees another: the block-diagonal causal mask.

Legend: B rows, T slots of a row, K key heads, C channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DocumentMask:
    """Passed as a model's `cache`, it keeps the documents of each row apart: `model(tokens, DocumentMask(documents))`.

    Every document is read as if it stood alone in its row: its tokens attend to one another only, causally, and its
    positions begin at 0. Nothing is stored between calls.

    Args:
        documents: (B, T) int64, the number of the document that each slot belongs to; the slots of a document are
            neighbors. Padding counts as a document of its own.

    Raises:
        ValueError: `documents` has not two dimensions.
    """

    length = 0
    longest = 0

    def __init__(self, documents: Tensor) -> None:
        if documents.ndim != 2:
            raise ValueError(f"documents has shape {tuple(documents.shape)}: give (batch, time)")
        self.documents = documents

    def positions(self, n_tokens: int) -> Tensor:
        """Place (B, T) int64 of each slot within its document.

        Raises:
            ValueError: the model is given another number of tokens than there are slots.
        """
        T = self.documents.shape[1]
        if n_tokens != T:
            raise ValueError(f"the rows have {n_tokens} tokens, documents describes {T}: give one for each")
        slots = torch.arange(T, device=self.documents.device).expand_as(self.documents)  # (B, T)
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return slots - torch.where(begins, slots, 0).cummax(dim=1).values

    def mask(self, n_tokens: int) -> Tensor:
        """Boolean (B, 1, T, T): True where query and key are of one document and the key is not later."""
        same = self.documents[:, :, None] == self.documents[:, None, :]  # (B, T, T)
        return same.tril()[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, K, T, C) as they are: there is no past to add."""
        return keys, values

    def advance(self, n_tokens: int) -> None:
        """Nothing is stored, so nothing is counted."""
