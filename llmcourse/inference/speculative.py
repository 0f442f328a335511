"""Speculative decoding: something cheap proposes several tokens, the model checks them all in one pass.

With a distribution q of the drafter and p of the model, a proposed token x is accepted with probability
min(1, p(x) / q(x)); the first rejected one is replaced by a draw from max(0, p - q), normalized. What comes out is
distributed as p, whatever the drafter (Leviathan et al., 2023, section 2; Chen et al., 2023). Greedy decoding is the
case of a p that is 1 on the likeliest token.

Shapes: T draft tokens, V vocab_size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmcourse.inference.generation import check_prompt
from llmcourse.inference.kv_cache import KVCache
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.sampling import SamplingParams, filtered_logits


class Drafter(Protocol):
    """Proposes what might come next."""

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], Tensor | None]:
        """At most n tokens after `ids`, and the distributions (T, V) they come from; `None` if each was certain."""
        ...


class PromptLookup:
    """Proposes what followed the latest tokens when they last occurred in the text itself (Saxena, 2023).

    Args:
        longest: tokens to look for, the longest match first.
        shortest: fewest tokens that count as a match.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest={shortest}, longest={longest}: give 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], None]:
        """The tokens after the latest earlier occurrence."""
        ids = list(ids)
        for size in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            tail = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == tail:
                    return ids[start + size : start + size + n], None
        return [], None


class NGramDrafter:
    """Proposes the most frequent next token after the latest ones, counted in a corpus; shorter ones where the longer
    were never seen.

    Args:
        documents: token ids of texts.
        order: tokens of the longest n-gram, the proposed one included.
        least: times that a continuation must have been seen.
    """

    def __init__(self, documents: Iterable[Sequence[int]], order: int = 4, least: int = 2) -> None:
        if order < 2 or least < 1:
            raise ValueError(f"order={order}, least={least}: give at least 2 and 1")
        self.order = order
        counts: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
        for document in documents:
            ids = tuple(document)
            for end in range(1, len(ids)):
                for size in range(1, min(order, end + 1)):
                    counts[size][ids[end - size : end]][ids[end]] += 1
        self._best: dict[tuple[int, ...], int] = {}
        for by_context in counts:
            for context, found in by_context.items():
                token, times = found.most_common(1)[0]
                if times >= least:
                    self._best[context] = token

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], None]:
        """The likeliest continuation by the counts, token by token."""
        ids = list(ids[-self.order :])
        found: list[int] = []
        while len(found) < n:
            for size in range(min(self.order - 1, len(ids)), 0, -1):
                token = self._best.get(tuple(ids[-size:]))
                if token is not None:
                    break
            else:
                break
            found.append(token)
            ids.append(token)
        return found, None


class ModelDrafter:
    """Proposes with a smaller model of the same vocabulary, which keeps a cache of its own.

    Args:
        runner: the small model.
        params: its temperature and filters; those of the large one are a good choice.
    """

    def __init__(
        self, runner: ModelRunner, params: SamplingParams, generator: torch.Generator | None = None
    ) -> None:
        self.runner, self.params, self.generator = runner, params, generator
        self._cache, self._ids = _single_cache(runner), []

    def propose(self, ids: Sequence[int], n: int) -> tuple[list[int], Tensor | None]:
        """Draws from the small model, with their distributions."""
        ids = list(ids)
        n = min(n, self.runner.config.context_length - len(ids))
        if n < 1:
            return [], None
        shared = _common_prefix(self._ids, ids[:-1])
        self._cache.truncate(shared)
        tokens, found, distributions = ids[shared:], [], []
        for _ in range(n):
            row = torch.tensor([tokens], device=self.runner.device)
            logits = self.runner.all_logits(row, self._cache)[0, -1:]
            q = target_distribution(logits, self.params)
            token = (
                int(q.argmax())
                if self.params.greedy
                else int(torch.multinomial(q[0], 1, generator=self.generator))
            )
            found.append(token)
            distributions.append(q)
            tokens = [token]
        self._ids = ids + found[:-1]
        return found, torch.cat(distributions)


@dataclass
class SpeculativeResult:
    """What was written and how."""

    new_ids: list[int] = field(default_factory=list)
    """without the stop id"""
    passes: int = 0
    """forward passes of the model, that of the prompt included"""
    proposed: int = 0
    """draft tokens checked"""
    accepted: int = 0
    """draft tokens kept"""

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a forward pass, the stop id not counted."""
        return len(self.new_ids) / max(1, self.passes)


@torch.inference_mode()
def speculative_generate(
    runner: ModelRunner,
    prompt: Sequence[int],
    params: SamplingParams,
    drafter: Drafter,
    *,
    n_draft: int = 4,
    stop_ids: Sequence[int] = (),
) -> SpeculativeResult:
    """Continue one prompt (token ids) with at most `n_draft` proposed tokens a pass.

    Raises:
        ValueError: an empty prompt, one that leaves no room, or less than one draft token.
    """
    context = runner.config.context_length
    check_prompt(prompt, context)
    if n_draft < 1:
        raise ValueError(f"n_draft={n_draft}: give at least 1")
    generator = None if params.seed is None else torch.Generator(runner.device).manual_seed(params.seed)
    cache, ids, result = _single_cache(runner), list(prompt), SpeculativeResult()
    room, stops = min(params.max_new_tokens, context - len(prompt)), set(stop_ids)
    while len(result.new_ids) < room:
        # the pass itself chooses one more token behind the drafts
        drafts, q = drafter.propose(ids, min(n_draft, room - len(result.new_ids) - 1))
        tokens = torch.tensor([ids[cache.length :] + drafts], device=runner.device)
        logits = runner.all_logits(tokens, cache)[0, -len(drafts) - 1 :]  # (T + 1, V)
        kept, last = verify(logits, drafts, q, params, generator)
        result.passes += 1
        result.proposed += len(drafts)
        result.accepted += kept
        cache.truncate(len(ids) + kept)
        for token in (*drafts[:kept], last):
            if token in stops:
                return result
            result.new_ids.append(token)
            ids.append(token)
    return result


def target_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution (T, V) that `sample` draws from for logits (T, V); one-hot if greedy."""
    if params.greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    return filtered_logits(logits, params).softmax(dim=-1)


def verify(
    logits: Tensor,
    drafts: Sequence[int],
    q: Tensor | None,
    params: SamplingParams,
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """How many of the draft tokens to keep, and the token behind them.

    Args:
        logits: (T + 1, V) of the model, before each draft token and after the last.
        drafts: T proposed tokens.
        q: (T, V), what they were drawn from; `None` if they were certain.
        params: how the model's tokens are to be drawn.
        generator: source of the decisions.
    """
    if params.greedy:
        likeliest = logits.argmax(dim=-1).tolist()
        kept = next((t for t, token in enumerate(drafts) if token != likeliest[t]), len(drafts))
        return kept, likeliest[kept]
    p = target_distribution(logits, params)  # (T + 1, V)
    for t, token in enumerate(drafts):
        chance = p[t, token] / (1.0 if q is None else q[t, token])
        if torch.rand((), generator=generator, device=p.device) < chance:
            continue
        rest = p[t].clone()
        if q is None:
            rest[token] = 0.0
        else:
            rest = (rest - q[t]).clamp(min=0)
        return t, int(torch.multinomial(rest, 1, generator=generator))
    return len(drafts), int(torch.multinomial(p[-1], 1, generator=generator))


def expected_tokens(acceptance: float, n_draft: int) -> float:
    """Tokens a pass gives on average if each draft token is accepted with probability a, independently: (1 - a^(T+1)) /
    (1 - a) (Leviathan et al., 2023, eq. 1).

    Raises:
        ValueError: a probability outside of 0 to 1, or less than one draft token.
    """
    if not 0 <= acceptance <= 1 or n_draft < 1:
        raise ValueError(
            f"acceptance={acceptance}, n_draft={n_draft}: give a probability and at least one token"
        )
    return float(n_draft + 1) if acceptance == 1 else (1 - acceptance ** (n_draft + 1)) / (1 - acceptance)


def _single_cache(runner: ModelRunner) -> KVCache:
    return KVCache(runner.config, 1, runner.config.context_length, device=runner.device, dtype=runner.dtype)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
