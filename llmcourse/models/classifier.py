"""A classification head on a decoder: one linear layer on the last token's hidden state.

Under a causal mask only the last token has read the whole text, so it stands for it; the first, where BERT puts its
[CLS] token (Devlin et al., 2019), has read nothing.

Shapes: B rows, T slots of a row, D d_model, Y classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcourse.models.transformer import Transformer


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Each row's vector at its last token, for rows padded on the right: hidden (B, T, D), lengths (B,) -> (B, D).

    Raises:
        ValueError: lengths of another shape, or a length outside 1 to T.
    """
    B, T = hidden.shape[:2]
    if lengths.shape != (B,):
        raise ValueError(f"lengths of shape {tuple(lengths.shape)} for {B} rows: give one for each")
    if B and not (int(lengths.min()) >= 1 and int(lengths.max()) <= T):
        raise ValueError(
            f"lengths from {int(lengths.min())} to {int(lengths.max())}: must be from 1 to T={T}"
        )
    return hidden[torch.arange(B, device=hidden.device), lengths - 1]


class SequenceClassifier(nn.Module):
    """Logits of a text's class: `Linear(last_token(hidden_states))`, as `LlamaForSequenceClassification` computes them.

    The transformer is not copied, and its output head takes no part: an untied one is frozen. The new layer starts at
    zero, so that the first loss is ln Y and the first gradient stops at it: a random one would push the pre-trained
    features in random directions before it has learned anything (compare Kumar et al., 2022). A linear probe is
    `classifier.transformer.requires_grad_(False)`.

    Raises:
        ValueError: fewer than 2 classes.
    """

    def __init__(self, transformer: Transformer, n_classes: int, *, bias: bool = False) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes={n_classes}: give at least 2")
        self.transformer = transformer
        if transformer.head.weight is not transformer.embedding.weight:
            transformer.head.requires_grad_(False)
        like = transformer.embedding.weight
        self.score = nn.Linear(
            transformer.config.d_model, n_classes, bias=bias, device=like.device, dtype=like.dtype
        )
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    @property
    def n_classes(self) -> int:
        """Y."""
        return self.score.out_features

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) int64, padded on the right, lengths (B,) int64 -> logits (B, Y).

        Raises:
            ValueError: what `last_token` refuses, or T exceeds the context length.
        """
        hidden = self.transformer.hidden_states(tokens)  # (B, T, D)
        return self.score(last_token(hidden, lengths))
