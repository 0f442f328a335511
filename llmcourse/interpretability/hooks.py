"""Named points inside a model, where its numbers can be looked at and replaced.

    with hooked(model, {"blocks.1.mlp_output": lambda value, name: 0 * value}):
        logits = model(tokens)

Everything is taken off again when the block ends, an exception included.

Shapes: B rows, T tokens, D d_model, H query heads, K key/value heads, C d_head, F d_ff. The points of a block:

    residual_before    (B, T, D)     what the block reads
    queries            (B, T, H, C)  before they are normalized and rotated
    keys, values       (B, T, K, C)
    pattern            (B, H, T, T)  attention weights, query by key; rows sum to 1
    head_outputs       (B, T, H, C)  each head's mixture of values, before the output matrix
    attention_output   (B, T, D)     what attention adds to the stream
    residual_middle    (B, T, D)
    mlp_hidden         (B, T, F)     activations between the two matrices
    mlp_output         (B, T, D)     what the feed-forward layer adds
    residual_after     (B, T, D)

Outside of blocks: "embedding" (B, T, D), "normalized" (B, T, D), what the head reads, and "logits" (B, T, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from llmcourse.models.attention import Attention, Cache, causal_mask, repeat_kv
from llmcourse.models.transformer import Block, Transformer

Hook = Callable[[Tensor, str], Tensor | None]
"""(value, name of the point) -> what takes its place; `None` leaves it as it is"""

BLOCK_POINTS = (
    "residual_before",
    "queries",
    "keys",
    "values",
    "pattern",
    "head_outputs",
    "attention_output",
    "residual_middle",
    "mlp_hidden",
    "mlp_output",
    "residual_after",
)


def hook_points(model: Transformer) -> list[str]:
    """The names of all points, in the order of computation."""
    blocks = [f"blocks.{i}.{point}" for i in range(model.config.n_layers) for point in BLOCK_POINTS]
    return ["embedding", *blocks, "normalized", "logits"]


def matching(model: Transformer, patterns: str | Sequence[str]) -> list[str]:
    """The points that a name or a pattern such as "blocks.*.pattern" stands for.

    Raises:
        ValueError: it stands for none.
    """
    names, found = hook_points(model), []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        some = [name for name in names if fnmatchcase(name, pattern)]
        if not some:
            raise ValueError(
                f"no point {pattern!r}: choose embedding, normalized, logits or blocks.<i>.<point> with a point of "
                + ", ".join(BLOCK_POINTS)
            )
        found += [name for name in some if name not in found]
    return found


@contextmanager
def hooked(model: Transformer, hooks: Mapping[str, Hook | Sequence[Hook]]) -> Iterator[Transformer]:
    """Call functions at points (names or patterns) of every forward pass inside of the `with` block.

    Several functions at one point are called in order, each with what the one before returned.

    Raises:
        ValueError: a point that is not there; in the forward pass, a function that returns another shape.
    """
    at: dict[str, list[Hook]] = {}
    for pattern, some in hooks.items():
        for name in matching(model, pattern):
            at.setdefault(name, []).extend([some] if callable(some) else some)
    with ExitStack() as stack:
        for name in hook_points(model):  # hooks of one module run in the order in which they are attached
            if name in at:
                _attach(model, name, _chain(name, at[name]), stack)
        yield model


def record(
    model: Transformer, tokens: Tensor, points: str | Sequence[str], hooks: Mapping[str, Hook] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, T, V) of tokens (B, T) and the values at points, by name; `hooks` act in the same pass.

    Values keep their graph where gradients are on.
    """
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, name: str) -> None:
        found[name] = value

    names = matching(model, points)
    together: dict[str, list[Hook]] = {}
    for pattern, function in (hooks or {}).items():
        for name in matching(model, pattern):
            together.setdefault(name, []).append(function)
    for name in names:
        together.setdefault(name, []).append(keep)  # after the changes
    with hooked(model, together):
        logits = model(tokens)
    return logits, found


# Changes that are often wanted ------------------------------------------------------------------------------


def set_to(value: Tensor, positions: Sequence[int] | slice = slice(None)) -> Hook:
    """A hook that puts `value`, of the point's shape, in place of what is computed at positions (axis 1)."""

    def hook(found: Tensor, name: str) -> Tensor:
        changed = found.clone()
        changed[:, positions] = value[:, positions]
        return changed

    return hook


def add(vector: Tensor, positions: Sequence[int] | slice = slice(None)) -> Hook:
    """A hook that adds a vector (D,) at positions (axis 1)."""

    def hook(found: Tensor, name: str) -> Tensor:
        changed = found.clone()
        changed[:, positions] += vector.to(found.dtype)
        return changed

    return hook


def set_heads(heads: Sequence[int], value: Tensor | float = 0.0) -> Hook:
    """A hook for "head_outputs" (B, T, H, C) that puts a number, or `value` of that
    shape or one that expands to it, in place of some heads."""

    def hook(found: Tensor, name: str) -> Tensor:
        changed = found.clone()
        wanted = (
            value.to(found.dtype).expand_as(found)[:, :, list(heads)] if isinstance(value, Tensor) else value
        )
        changed[:, :, list(heads)] = wanted
        return changed

    return hook


# How a point is reached -------------------------------------------------------------------------------------


def _chain(name: str, functions: Sequence[Hook]) -> Callable[[Tensor], Tensor]:
    def apply(value: Tensor) -> Tensor:
        for function in functions:
            changed = function(value, name)
            if changed is None:
                continue
            if changed.shape != value.shape:
                raise ValueError(
                    f"the hook at {name!r} returned {tuple(changed.shape)} in place of {tuple(value.shape)}"
                )
            value = changed
        return value

    return apply


def _attach(model: Transformer, name: str, apply: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """Attach to one point; `stack` takes it off."""
    outside: dict[str, nn.Module] = {
        "embedding": model.embedding,
        "normalized": model.final_norm,
        "logits": model.head,
    }
    if name in outside:
        _after(outside[name], apply, stack)
        return
    _, number, point = name.split(".")
    block: Block = model.blocks[int(number)]
    attention = block.attention
    if point == "residual_before":
        _before(block, apply, stack)
    elif point in ("queries", "keys", "values"):
        n_heads = attention.n_heads if point == "queries" else attention.n_kv_heads
        module = {"queries": attention.query, "keys": attention.key, "values": attention.value}[point]
        _after(module, _by_head(apply, n_heads), stack)
    elif point == "pattern":
        _replace_attention(attention, apply, stack)
    elif point == "head_outputs":
        _before(attention.output, _by_head(apply, attention.n_heads), stack)
    elif point == "attention_output":
        _after(attention, apply, stack)
    elif point == "residual_middle":
        _between(block, apply, stack)
    elif point == "mlp_hidden":
        _before(block.mlp.down, apply, stack)
    elif point == "mlp_output":
        _after(block.mlp, apply, stack)
    else:
        _after(block, apply, stack)


def _before(module: nn.Module, apply: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    handle = module.register_forward_pre_hook(lambda _, inputs: (apply(inputs[0]), *inputs[1:]))
    stack.callback(handle.remove)


def _after(module: nn.Module, apply: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    handle = module.register_forward_hook(lambda _, inputs, output: apply(output))
    stack.callback(handle.remove)


def _by_head(apply: Callable[[Tensor], Tensor], n_heads: int) -> Callable[[Tensor], Tensor]:
    def by_head(value: Tensor) -> Tensor:
        return apply(value.unflatten(-1, (n_heads, -1))).flatten(-2)

    return by_head


def _between(block: Block, apply: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """The stream between attention and feed-forward layer, which no module puts out: what attention adds is chosen so
    that the sum is what the hook wants."""
    reads: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reads[:] = [inputs[0]]

    def change(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        middle = reads[0] + output
        changed = apply(middle)
        if changed is middle and not torch.is_grad_enabled():
            return None
        return (
            changed - reads[0]
        )  # with gradients even if unchanged: what follows must come from the recorded value

    for handle in (
        block.attention_norm.register_forward_pre_hook(note),
        block.attention.register_forward_hook(change),
    ):
        stack.callback(handle.remove)


def _replace_attention(attention: Attention, apply: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """Compute the weights, which the fast kernels never hold, and hand them to the hook."""
    was = vars(attention).get("forward")

    def forward(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = attention.heads(x, cos, sin)
        if cache is None:
            mask = causal_mask(q.shape[2], k.shape[2], q.device)
        else:
            k, v = cache.update(layer, k, v)
        groups = attention.n_heads // attention.n_kv_heads
        scores = q @ repeat_kv(k, groups).transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, Tq, Tk)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        mixed = apply(scores.softmax(dim=-1)) @ repeat_kv(v, groups)  # (B, H, T, C)
        return attention.output(mixed.transpose(1, 2).flatten(-2))

    def restore() -> None:
        if was is None:
            del attention.forward
        else:
            attention.forward = was

    attention.forward = forward
    stack.callback(restore)
