"""Where does a behavior come from? Activations of one prompt are put into the run of another.

Two prompts that differ in what matters and agree in everything else, "clean" and "corrupted". *Activation patching*
(Meng et al., 2022, "causal tracing"; Heimersheim and Nanda, 2024, for practice) runs the corrupted prompt with one
activation of the clean one: what brings the clean answer back carries the difference. *Path patching* (Wang et al.,
2023; Goldowsky-Dill et al., 2023) lets a change at a sender reach only one receiver, everything else held at its clean
values. *Attribution patching* (Nanda, 2023) estimates all patches from one gradient.

Shapes: B pairs of prompts, T tokens, L n_layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcourse.interpretability.hooks import Hook, matching, record, set_heads, set_to
from llmcourse.interpretability.induction import Head
from llmcourse.models.transformer import Transformer

Metric = Callable[[Tensor], Tensor]
"""logits (B, T, V) -> a number for each pair, (B,)"""


NO_RECEIVERS = ("embedding", "normalized", "head_outputs", "attention_output", "mlp_output")
"""points that `patch_path` holds at the clean run, or that follow from others that it holds"""


def logit_lead(answers: Sequence[int] | Tensor, others: Sequence[int] | Tensor, position: int = -1) -> Metric:
    """By how much the logit of the clean answer is ahead of that of the corrupted one."""
    answers, others = torch.as_tensor(answers), torch.as_tensor(others)

    def metric(logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        last = logits[:, position].float()
        return last[rows, answers.to(logits.device)] - last[rows, others.to(logits.device)]

    return metric


def recovered(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The share of the difference that a patch brings back: 0 as corrupted, 1 as clean. Means over pairs first, so that
    a pair without a difference cannot dominate; patched (.., B), the others (B,) -> (..)."""
    gap = clean.mean() - corrupted.mean()
    return (patched.mean(dim=-1) - corrupted.mean()) / gap


def check_pairs(clean: Tensor, corrupted: Tensor) -> None:
    """Raises ValueError where the two prompts of a pair are not of the same length or do not differ."""
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean prompts {tuple(clean.shape)}, corrupted {tuple(corrupted.shape)}: they must align"
        )
    if bool((clean == corrupted).all(dim=1).any()):
        raise ValueError("a pair consists of two equal prompts: there is nothing to bring back")


@torch.no_grad()
def patch_positions(
    model: Transformer, clean: Tensor, corrupted: Tensor, point: str, metric: Metric
) -> Tensor:
    """Patch a kind of point, such as "residual_before", layer by layer and position by position.

    clean and corrupted (B, T) int64 -> metric of each patched run, (L, T, B).
    """
    check_pairs(clean, corrupted)
    names = matching(model, f"blocks.*.{point}")
    _, source = record(model, clean, names)
    found = []
    for name in names:
        for position in range(clean.shape[1]):
            logits, _ = record(model, corrupted, "logits", {name: set_to(source[name], [position])})
            found.append(metric(logits))
    return torch.stack(found).view(len(names), clean.shape[1], -1)


@torch.no_grad()
def patch_heads(model: Transformer, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
    """Patch the output of each head at all positions: (L, H, B)."""
    check_pairs(clean, corrupted)
    names = matching(model, "blocks.*.head_outputs")
    _, source = record(model, clean, names)
    found = []
    for name in names:
        for head in range(model.config.n_heads):
            logits, _ = record(model, corrupted, "logits", {name: set_heads([head], source[name])})
            found.append(metric(logits))
    return torch.stack(found).view(len(names), model.config.n_heads, -1)


def attribution_patch(
    model: Transformer, clean: Tensor, corrupted: Tensor, point: str, metric: Metric
) -> Tensor:
    """First-order estimate of `patch_positions`: metric of the corrupted run plus (clean - corrupted activation) times
    its gradient there, (L, T, B). Two forward passes and one backward for the whole map."""
    check_pairs(clean, corrupted)
    names = matching(model, f"blocks.*.{point}")
    with torch.no_grad():
        _, source = record(model, clean, names)
    with torch.enable_grad():

        def with_gradient(value: Tensor, name: str) -> Tensor:
            return value if value.requires_grad else value.requires_grad_(True)

        logits, found = record(model, corrupted, names, dict.fromkeys(names, with_gradient))
        values = metric(logits)
        gradients = torch.autograd.grad(values.sum(), [found[name] for name in names])
    changes = [
        ((source[name] - found[name].detach()) * gradient).flatten(2).sum(dim=-1).T
        for name, gradient in zip(names, gradients, strict=True)
    ]  # (T, B) each
    return values.detach() + torch.stack(changes)


@torch.no_grad()
def patch_path(
    model: Transformer,
    clean: Tensor,
    corrupted: Tensor,
    senders: Sequence[Head],
    receivers: Sequence[str],
    metric: Metric,
) -> Tensor:
    """Effect of what senders tell receivers *directly*: the clean run in which receivers see the senders of the
    corrupted run and everything else as it was, (B,).

    Args:
        model: the model.
        clean: (B, T) int64.
        corrupted: (B, T) int64.
        senders: heads whose outputs are those of the corrupted run.
        receivers: points that may change, such as "blocks.2.keys", all later than the senders; "logits" for the direct
            path to the output.
        metric: what to measure.

    Raises:
        ValueError: prompts that do not align, a receiver that is not later than a sender, one that is the output of
            heads or a feed-forward layer (these are held), or logits beside others.
    """
    check_pairs(clean, corrupted)
    points = matching(model, list(receivers))
    if "logits" in points and len(points) > 1:
        raise ValueError(f"receivers {points}: the path to the output is one of its own, give logits alone")
    for point in points:
        if point in NO_RECEIVERS or point.rpartition(".")[2] in NO_RECEIVERS:
            raise ValueError(
                f"{point} cannot receive: what it puts out is held at the clean run; give what it reads"
            )
        layer = model.config.n_layers if point == "logits" else int(point.split(".")[1])
        if any(sender >= layer for sender, _ in senders):
            raise ValueError(f"{point} is not behind all senders {list(senders)}: a path goes forward")
    parts = matching(model, ["blocks.*.head_outputs", "blocks.*.mlp_output"])
    _, of_clean = record(model, clean, parts)
    _, of_corrupted = record(model, corrupted, "blocks.*.head_outputs")
    # 1. all heads and feed-forward layers as in the clean run, but for the senders: what do the receivers see?
    frozen: dict[str, Hook] = {name: set_to(of_clean[name]) for name in parts}
    for layer in {layer for layer, _ in senders}:
        name = f"blocks.{layer}.head_outputs"
        mixed = of_clean[name].clone()
        heads = [head for other, head in senders if other == layer]
        mixed[:, :, heads] = of_corrupted[name][:, :, heads]
        frozen[name] = set_to(mixed)
    logits, seen = record(model, clean, points, frozen)
    if points == ["logits"]:
        return metric(logits)
    # 2. the clean run with the receivers seeing just that
    logits, _ = record(model, clean, "logits", {name: set_to(seen[name]) for name in points})
    return metric(logits)
