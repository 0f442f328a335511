"""Which weights of a model fine-tuning moves: all, the last blocks, or the head alone."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from torch import nn

from llmcourse.models.transformer import Transformer

TRAINABLE = re.compile(r"full|head|last:([0-9]+)")


@dataclass(frozen=True)
class Trainable:
    """How much of a model moves."""

    parameters: int
    """numbers that training changes; tied weights count once"""
    total: int
    """numbers in the model"""

    @property
    def share(self) -> float:
        """Of all numbers, the fraction that moves."""
        return self.parameters / self.total

    def __str__(self) -> str:
        return f"{self.parameters:,} of {self.total:,} parameters ({self.share:.1%})"


def count_trainable(model: nn.Module) -> Trainable:
    """Count the numbers of a model, and those among them that require a gradient."""
    parameters = list(model.parameters())
    moving = sum(p.numel() for p in parameters if p.requires_grad)
    return Trainable(moving, sum(p.numel() for p in parameters))


def train_all(model: nn.Module) -> Trainable:
    """Full fine-tuning: every parameter moves."""
    model.requires_grad_(True)
    return count_trainable(model)


def train_last_blocks(model: Transformer, n: int) -> Trainable:
    """The last n blocks, the final norm and the head move; the embedding and the blocks below are frozen.

    A tied head is untied first (see `untie_head`). Backward passes end at the lowest block that moves.

    Raises:
        ValueError: n is not between 1 and the number of blocks.
    """
    if not 1 <= n <= len(model.blocks):
        raise ValueError(f"n={n} blocks to train: the model has {len(model.blocks)}, give 1 to that many")
    untie_head(model)
    model.requires_grad_(False)
    for part in (*model.blocks[-n:], model.final_norm, model.head):
        part.requires_grad_(True)
    return count_trainable(model)


def train_head(model: Transformer) -> Trainable:
    """Only the output head moves: a linear classifier on frozen features. A tied head is untied first."""
    untie_head(model)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return count_trainable(model)


def untie_head(model: Transformer) -> None:
    """Give a head that shares the embedding's matrix a copy of its own, and note it in `model.config`.

    Otherwise training the head would change what the frozen blocks read. The logits stay the same; the model grows by
    V D parameters.
    """
    if model.head.weight is model.embedding.weight:
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        model.config = dataclasses.replace(model.config, tie_embeddings=False)


def choose_trainable(model: Transformer, name: str) -> Trainable:
    """By name: "full", "head", or "last:K" for the last K blocks with final norm and head.

    Raises:
        ValueError: another name, or what `train_last_blocks` refuses.
    """
    match = TRAINABLE.fullmatch(name)
    if match is None:
        raise ValueError(f"trainable={name!r}: choose full, head or last:K, such as last:2")
    if match[1]:
        return train_last_blocks(model, int(match[1]))
    return train_all(model) if name == "full" else train_head(model)
