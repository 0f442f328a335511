"""Static batching, the baseline: a batch is chosen, runs until its longest answer is finished, then comes the next.

Rows whose answers are complete go on being computed and are thrown away, and nobody takes their place (what Yu et al.,
2022, section 3, set out to remove). `generate` is one step better, since finished rows leave its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcourse.inference.kv_cache import KVCache
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.sampling import SamplingParams, sample


@torch.inference_mode()
def static_batches(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], *, batch_size: int
) -> list[list[int]]:
    """Greedy continuations of each prompt (token ids), `new_tokens` of each, in batches of the given order.

    Raises:
        ValueError: the longest prompt of a batch and its longest answer do not fit the context together, since its
            rows go on to the same length; an empty prompt or answer, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    if not all(prompts) or min(new_tokens, default=1) < 1:
        raise ValueError("an empty prompt or answer: give at least one token of each")
    found: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        end = start + batch_size
        found += _run_batch(runner, prompts[start:end], new_tokens[start:end])
    return found


def _run_batch(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
) -> list[list[int]]:
    device, context = runner.device, runner.config.context_length
    longest, steps = max(len(prompt) for prompt in prompts), max(new_tokens)
    if longest + steps > context:
        raise ValueError(
            f"a batch with a prompt of {longest} and an answer of {steps} tokens exceeds the context of {context}: "
            "put others together"
        )
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = KVCache(
        runner.config, len(prompts), longest + steps, padding=padding, device=device, dtype=runner.dtype
    )
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    last = torch.full((len(prompts),), longest - 1, device=device)
    greedy, written = SamplingParams(temperature=0.0), []
    for _ in range(steps):
        chosen = sample(runner.logits(tokens, cache, last), greedy)
        written.append(chosen)
        tokens, last = chosen[:, None], torch.zeros_like(last)
    rows = torch.stack(written, dim=1).tolist()  # (B, steps)
    return [row[:n] for row, n in zip(rows, new_tokens, strict=True)]
