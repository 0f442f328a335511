"""Learning rates that survive a change of width: muP and the simple rule, as parameter groups, and how to check them.

Under AdamW an update has the size of the learning rate whatever the gradient's size. So a hidden matrix moves each of
its outputs by the sum of D such updates, all aligned with its input: D times the learning rate. A model twice as wide
needs half the rate there; embeddings and gains, whose outputs sum over nothing, keep theirs.

Symbols: D d_model, D_0 d_model of the base model that the rate was tuned on, m = D / D_0 the width multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.models.transformer import Transformer
from llmcourse.training.optimizers import split_parameters

RULES = ("standard", "simple", "mup")
"""standard: one rate for all; simple: hidden matrices get 1 / m; mup: also embeddings and logits are made for width"""

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int, dict[str, Any]]]


def width_multiplier(d_model: int, base_width: int, rule: str = "mup") -> float:
    """m = D / D_0, by which the rate of hidden matrices is divided; 1 under the standard rule.

    Raises:
        ValueError: an unknown rule, or a width below 1.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
    if d_model < 1 or base_width < 1:
        raise ValueError(f"d_model={d_model}, base_width={base_width}: give widths of at least 1")
    return 1.0 if rule == "standard" else d_model / base_width


def prepare(model: Transformer, base_width: int, rule: str = "mup") -> Transformer:
    """Give a freshly made model the initialization and the output multiplier of muP; returns the same model.

    Yang et al. (2022, table 8, for tied embeddings): embeddings start with a variance that does not depend on the
    width (here the base model's), hidden matrices with 1 / fan-in (as `Transformer` does), and logits are multiplied
    by 1 / m. At the base width nothing changes. Widths must grow by adding heads of one size: with wider heads muP
    also divides the attention scores by C instead of sqrt(C). "standard" and "simple" leave the model as it is.

    The multiplier is a hook on the head, which `fold_multiplier` turns into weights once training is over.

    Raises:
        ValueError: as in `width_multiplier`, or the model has a multiplier already.
    """
    m = width_multiplier(model.config.d_model, base_width, rule)
    if rule != "mup" or m == 1:
        return model
    if hasattr(model, "_logit_hook"):
        raise ValueError("this model has an output multiplier already: prepare a fresh one")
    with torch.no_grad():
        model.embedding.weight.mul_(math.sqrt(m))  # from N(0, 9 / D) to N(0, 9 / D_0)
        if model.head.weight is not model.embedding.weight:
            model.head.weight.mul_(math.sqrt(m))
    model._logit_multiplier = 1 / m
    model._logit_hook = model.head.register_forward_hook(lambda _module, _inputs, logits: logits / m)
    return model


@torch.no_grad()
def fold_multiplier(model: Transformer) -> Transformer:
    """Move the output multiplier into the final norm's gain: the same function as a plain `Transformer`, to be saved.

    Only after training: under AdamW a smaller gain would move by larger factors.
    """
    if hasattr(model, "_logit_hook"):
        model._logit_hook.remove()
        model.final_norm.weight.mul_(model._logit_multiplier)
        del model._logit_hook, model._logit_multiplier
    return model


def parameter_groups(
    model: nn.Module, base_width: int, rule: str = "mup", *, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, each with the "lr_scale" that `fit` multiplies the learning rate by.

    Hidden matrices get 1 / m (Yang et al., 2022, tables 3 and 8, Adam), embeddings, head and gains 1. AdamW shrinks a
    weight by learning rate x decay a step; the decay of hidden matrices is multiplied by m, so that this product does
    not change with the width.

    Raises:
        ValueError: as in `width_multiplier`.
    """
    m = width_multiplier(model.config.d_model, base_width, rule)
    hidden, embeddings, vectors = split_parameters(model)
    groups = [
        {"params": hidden, "lr_scale": 1 / m, "weight_decay": weight_decay * m},
        {"params": embeddings, "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def width_scaled_adamw(
    model: nn.Module,
    base_width: int,
    rule: str = "mup",
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> list[torch.optim.Optimizer]:
    """The `optimizers` of a `fit` whose settings hold the base model's learning rate.

    Raises:
        ValueError: as in `width_multiplier`.
    """
    groups = parameter_groups(model, base_width, rule, weight_decay=weight_decay)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)]


def coordinate_check(
    make_model: Callable[[int], Transformer],
    widths: Sequence[int],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    base_width: int,
    rule: str = "mup",
    lr: float = 1e-2,
    steps: int = 4,
) -> list[dict[str, Any]]:
    """How far a few steps move the activations of models of several widths (Yang et al., 2022, appendix D.1).

    In muP every activation moves by an amount that does not depend on the width; where the amount grows with width, the
    learning rate is too large for wide models, where it falls, that layer stops learning.

    Args:
        make_model: a fresh model of that d_model; `prepare` is applied here.
        widths: d_model of each model.
        batches: step i trains on number i modulo their number; activations are compared on the first.
        loss: as for `fit`.
        base_width: D_0.
        rule: one of `RULES`.
        lr: constant learning rate at the base width.
        steps: number of steps.

    Returns:
        One record for each width, step (0 .. steps) and layer: {"width", "step", "layer", "size", "change"}; layers are
        "embedding", "block 0", ... and "logits". "size" is the root mean square of the layer's output, "change" that of
        its difference from step 0.

    Raises:
        ValueError: no batches or no steps, or as in `width_multiplier`.
    """
    if not batches or steps < 1:
        raise ValueError(f"{len(batches)} batches, steps={steps}: give at least one of each")
    records = []
    for width in widths:
        model = prepare(make_model(width), base_width, rule)
        optimizer = width_scaled_adamw(model, base_width, rule, lr=lr, weight_decay=0.0)[0]
        start = _activations(model, batches[0]["tokens"])
        for step in range(steps + 1):
            now = _activations(model, batches[0]["tokens"])
            for layer, output in now.items():
                change = _rms(output - start[layer])
                records.append(
                    {"width": width, "step": step, "layer": layer, "size": _rms(output), "change": change}
                )
            total, count, _ = loss(model, batches[step % len(batches)])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return records


def width_exponent(records: Sequence[dict[str, Any]], layer: str, what: str = "change") -> float:
    """Slope of ln(size or change) over ln(width) at the last step: about 0 where a layer is made for width.

    Raises:
        ValueError: no such layer, or fewer than 2 widths.
    """
    last = max(record["step"] for record in records)
    chosen = [record for record in records if record["step"] == last and record["layer"] == layer]
    if len({record["width"] for record in chosen}) < 2:
        raise ValueError(f"layer={layer!r} is there at fewer than 2 widths: check its name, or add widths")
    widths, values = [record["width"] for record in chosen], [record[what] for record in chosen]
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


@torch.no_grad()
def _activations(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Output of the embedding, of each block, and the logits."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: found.update({name: output.float()})

    layers = {"embedding": model.embedding} | {f"block {i}": block for i, block in enumerate(model.blocks)}
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    logits = model(tokens).float()
    for hook in hooks:
        hook.remove()
    return found | {"logits": logits}


def _rms(values: Tensor) -> float:
    return float(values.pow(2).mean().sqrt())
