"""Reading the residual stream as a distribution over tokens, and crediting its parts with the logits.

The stream is a sum, and the head is linear but for one norm. So every partial sum can be read (nostalgebraist, 2020,
"the logit lens"), and with the norm's scale held fixed a logit is a sum with one term for each component (Elhage et
al., 2021, "direct logit attribution").

Shapes: B rows, T tokens, D d_model, V vocab_size, L n_layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcourse.interpretability.hooks import Hook, record
from llmcourse.models.transformer import Transformer


def read_stream(model: Transformer, residual: Tensor) -> Tensor:
    """Logits (.., V) of a residual stream (.., D): final norm and head, wherever the stream was taken."""
    return model.head(model.final_norm(residual))


def logit_lens(model: Transformer, tokens: Tensor, hooks: dict[str, Hook] | None = None) -> Tensor:
    """Log-probabilities (L + 1, B, T, V) in nats before the first block and after each; the last are the model's."""
    points = ["embedding", *(f"blocks.{i}.residual_after" for i in range(model.config.n_layers))]
    _, found = record(model, tokens, points, hooks)
    return torch.stack([read_stream(model, found[name]).log_softmax(dim=-1) for name in points])


def components(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What each part adds to the stream, (B, T, D) each: "embedding", "blocks.i.head.h", "blocks.i.mlp". Their sum is
    the stream behind the last block."""
    _, found = record(model, tokens, ["embedding", "blocks.*.head_outputs", "blocks.*.mlp_output"])
    parts = {"embedding": found["embedding"]}
    for i, block in enumerate(model.blocks):
        heads = found[f"blocks.{i}.head_outputs"]  # (B, T, H, C)
        matrix = block.attention.output.weight.unflatten(1, (heads.shape[2], -1))  # (D, H, C)
        for h in range(heads.shape[2]):
            parts[f"blocks.{i}.head.{h}"] = heads[:, :, h] @ matrix[:, h].T
        parts[f"blocks.{i}.mlp"] = found[f"blocks.{i}.mlp_output"]
    return parts


def logit_attribution(
    model: Transformer,
    tokens: Tensor,
    answers: Sequence[int] | Tensor,
    others: Sequence[int] | Tensor | None = None,
    *,
    position: int = -1,
) -> dict[str, Tensor]:
    """How much each component adds to the logit of `answers`, or to its lead over the logit of `others`, (B,) each.

    The terms sum to that logit difference exactly: the final norm's scale is taken from the whole stream. A component
    that raises all logits alike shows only without `others`, and then says nothing.
    """
    parts = components(model, tokens)
    stream = torch.stack([part[:, position] for part in parts.values()])  # (parts, B, D)
    whole = stream.sum(dim=0).float()
    scale = (whole.pow(2).mean(dim=-1) + model.final_norm.eps).rsqrt()  # (B,)
    direction = model.head.weight[torch.as_tensor(answers, device=tokens.device)]  # (B, D)
    if others is not None:
        direction = direction - model.head.weight[torch.as_tensor(others, device=tokens.device)]
    direction = direction * model.final_norm.weight * scale[:, None]
    values = torch.einsum("pbd,bd->pb", stream, direction)
    return dict(zip(parts, values, strict=True))
