"""Batched generation with a key/value cache: prefill the prompts once, then one token a row and step.

Shapes: B rows still running, T longest prompt, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmcourse.inference.fused import FusedTransformer, can_fuse
from llmcourse.inference.kv_cache import KVCache
from llmcourse.inference.sampling import SamplingParams, sample
from llmcourse.models.transformer import Transformer


class TextCodec(Protocol):
    """The part of a tokenizer that generation needs."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text."""
        ...


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    stop_ids: Sequence[int] = (),
    tokenizer: TextCodec | None = None,
    use_cache: bool = True,
    fused: bool = True,
) -> list[list[int]]:
    """Continue each prompt (token ids); returns only the new ids, without the stop id that ended them.

    All prompts run as one batch, padded on the left; a row that has finished leaves the batch, so that greedy results
    do not depend on the company. A row also ends where its context is full. `use_cache=False` recomputes everything at
    each step, for comparison only. `fused` runs the steps through a `FusedTransformer` where `can_fuse` allows it: the
    same numbers up to rounding, sooner.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, or stop strings without a tokenizer.
    """
    if not prompts:
        return []
    _check_prompts(model, prompts, params, tokenizer)
    device = next(model.parameters()).device
    generator = None if params.seed is None else torch.Generator(device).manual_seed(params.seed)
    longest = max(len(prompt) for prompt in prompts)
    context = model.config.context_length
    shortest = min(len(prompt) for prompt in prompts)
    room = min(params.max_new_tokens, context - shortest)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    cache = _new_cache(model, padding, longest + room) if use_cache else None
    fast = FusedTransformer(model) if use_cache and fused and can_fuse(model) else None
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    new_ids: list[list[int]] = [[] for _ in prompts]
    stops = set(stop_ids)
    for _ in range(room):
        logits = fast.logits(tokens, cache) if fast else _last_logits(model, tokens, padding, cache)  # (B, V)
        chosen = sample(logits, params, generator)  # (B,)
        running = []
        for i, token in enumerate(chosen.tolist()):
            if token in stops:
                continue
            new = new_ids[rows[i]]
            new.append(token)
            is_full = len(prompts[rows[i]]) + len(new) == context
            if not is_full and not (params.stop and holds_stop(new, params, tokenizer)):
                running.append(i)
        if not running:
            break
        if len(running) < len(rows):
            keep = torch.tensor(running, device=device)
            rows, chosen, padding = [rows[i] for i in running], chosen[keep], padding[keep]
            tokens = tokens[keep]
            if cache is not None:
                cache.keep_rows(keep)
        tokens = chosen[:, None] if cache is not None else torch.cat((tokens, chosen[:, None]), dim=1)
    return new_ids


def complete(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 64,
    **changes: object,
) -> list[str]:
    """Continuations of text prompts, as text, cut before a stop string; ends at the end-of-text token.

    `changes` are fields of `SamplingParams`, for short: `complete(model, tokenizer, ["Once"], temperature=0)`.

    Raises:
        ValueError: both `params` and `changes`, a batch size below 1, or whatever `generate` refuses.
    """
    if params is not None and changes:
        raise ValueError(f"{', '.join(changes)}: give params or single values, not both")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    params = params or SamplingParams(**changes)  # type: ignore[arg-type]
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # like lengths together: less padding
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = generate(
            model,
            [encoded[i] for i in part],
            params.with_seed_plus(start),
            stop_ids=(tokenizer.eos_id,),
            tokenizer=tokenizer,
        )
        for i, new in zip(part, ids, strict=True):
            texts[i] = _cut(tokenizer.decode(new), params.stop)
    return texts


def check_prompt(prompt: Sequence[int], context: int, name: str = "the prompt") -> None:
    """Refuse a prompt that cannot be continued.

    Raises:
        ValueError: it is empty, or leaves no room in a context of so many tokens.
    """
    if not prompt:
        raise ValueError(f"{name} is empty: begin with the end-of-text token to start from nothing")
    if len(prompt) >= context:
        raise ValueError(
            f"{name} has {len(prompt)} tokens and the context holds {context}: shorten it to leave room"
        )


def _check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], params: SamplingParams, tokenizer: TextCodec | None
) -> None:
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, model.config.context_length, f"prompt {number}")
    if params.stop and tokenizer is None:
        raise ValueError(f"stop={params.stop!r} needs a tokenizer to see the text: pass tokenizer=")


def _new_cache(model: Transformer, padding: Tensor, capacity: int) -> KVCache:
    weight = model.embedding.weight
    return KVCache(
        model.config, len(padding), capacity, padding=padding, device=weight.device, dtype=weight.dtype
    )


def _last_logits(model: Transformer, tokens: Tensor, padding: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) after the last token; only that position goes through the head."""
    if cache is None and bool(padding.any()):
        # a throw-away cache carries the padding, so that both paths mask alike
        cache = _new_cache(model, padding, tokens.shape[1])
    return model.head(model.hidden_states(tokens, cache)[:, -1])


def holds_stop(ids: list[int], params: SamplingParams, tokenizer: TextCodec | None) -> bool:
    """Whether the end of the new ids holds a stop string."""
    assert tokenizer is not None
    longest = max(len(s.encode()) for s in params.stop)
    tail = tokenizer.decode(ids[-(longest + 8) :])  # a token has at least a byte, so the tail is long enough
    return any(stop in tail for stop in params.stop)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
