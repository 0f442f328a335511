"""Directions that change behavior: found as differences of means, added while the model runs, or taken out.

Shapes: N examples, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmcourse.interpretability.hooks import Hook, add, hooked, matching
from llmcourse.models.transformer import Transformer


def mean_difference(wanted: Tensor, unwanted: Tensor) -> Tensor:
    """Mean activation of examples (N, D) that show something less that of examples that do not, (D,) (Marks and
    Tegmark, 2024; Rimsky et al., 2024, "contrastive activation addition").

    Raises:
        ValueError: a side without examples.
    """
    if not len(wanted) or not len(unwanted):
        raise ValueError(f"{len(wanted)} wanted and {len(unwanted)} unwanted examples: give some of each")
    return wanted.float().mean(dim=0) - unwanted.float().mean(dim=0)


@contextmanager
def steered(
    model: Transformer,
    layer: int,
    vector: Tensor,
    scale: float = 1.0,
    positions: Sequence[int] | slice = slice(None),
) -> Iterator[Transformer]:
    """Add `scale` times a vector (D,) to the stream behind a block while the `with` block lasts.

    With a cache, positions count from the first token of each call; leave them out for generation.
    """
    with hooked(model, {f"blocks.{layer}.residual_after": add(scale * vector, positions)}):
        yield model


@contextmanager
def without_direction(
    model: Transformer, vector: Tensor, points: str | Sequence[str] = "blocks.*.residual_after"
) -> Iterator[Transformer]:
    """Project a direction (D,) out of the stream at all given points (Arditi et al., 2024, "directional ablation").

    Raises:
        ValueError: a vector of length 0, which has no direction.
    """
    length = vector.norm()
    if not length > 0:
        raise ValueError("the vector is zero and has no direction")
    unit = vector / length

    def project(value: Tensor, name: str) -> Tensor:
        along = (value @ unit.to(value.dtype))[..., None]
        return value - along * unit.to(value.dtype)

    hooks: dict[str, Hook] = dict.fromkeys(matching(model, points), project)
    with hooked(model, hooks):
        yield model


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors (D,)."""
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=0))
