"""Quality of what a model writes: exact match on probes, and stories judged by the generator's own rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmcourse.data.tinytown import Town
from llmcourse.data.town_probes import Probe
from llmcourse.evaluation.statistics import Estimate, wilson_interval
from llmcourse.inference.generation import TextCodec, complete
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class StoryQuality:
    """Shares of a model's own stories that pass the generator's rules."""

    grammatical: Estimate
    """every sentence is one of the grammar's, down to a closing sentence"""
    consistent: Estimate
    """grammatical, and every event possible and the closing statement true"""
    sentences_right: Estimate
    """share of all sentences that are right"""


def count_matches(
    model: Transformer, tokenizer: TextCodec, probes: Sequence[Probe], *, max_new_tokens: int = 24
) -> int:
    """Number of probes whose greedy completion begins with the answer.

    A probe whose prompt alone fills the model's context counts as missed.
    """
    context = model.config.context_length
    read = [probe for probe in probes if len(tokenizer.encode(probe.prompt)) < context]
    texts = complete(
        model, tokenizer, [p.prompt for p in read], temperature=0.0, max_new_tokens=max_new_tokens
    )
    return sum(probe.matches(text) for probe, text in zip(read, texts, strict=True))


def exact_match(
    model: Transformer, tokenizer: TextCodec, probes: Sequence[Probe], *, max_new_tokens: int = 24
) -> Estimate:
    """Share of probes that `count_matches` counts, with Wilson's 95 % interval."""
    matches = count_matches(model, tokenizer, probes, max_new_tokens=max_new_tokens)
    return wilson_interval(matches, len(probes))


def story_quality(
    model: Transformer,
    tokenizer: TextCodec,
    town: Town,
    n: int = 100,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> StoryQuality:
    """Let the model write `n` stories, each from the first sentence of a fresh one, and judge them by the town's
    rules."""
    openings = [
        d.text.split(". ")[0] + "." for d in town.documents(n, seed=seed + 10_000_019, kinds=["story"])
    ]
    params = SamplingParams(temperature=temperature, max_new_tokens=192, seed=seed)
    texts = complete(model, tokenizer, openings, params)
    scores = [town.score_story(opening + text) for opening, text in zip(openings, texts, strict=True)]
    sentences = sum(s.sentences for s in scores)
    return StoryQuality(
        grammatical=wilson_interval(sum(s.grammatical for s in scores), n),
        consistent=wilson_interval(sum(s.consistent for s in scores), n),
        sentences_right=wilson_interval(max(0, sentences - sum(s.wrong for s in scores)), sentences),
    )


def town_report(
    model: Transformer, tokenizer: TextCodec, town: Town, *, n: int = 256, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """All of Tinytown's probes as plain data: name -> {"value", "low", "high", "n"}.

    facts: closed-book facts of residents, in wordings seen in training. facts_reworded: in a wording never seen.
    sums: held-out pairs, half of them in each of the corpus's two forms, `37 + 48 =` (sums_plain) and `37 + 48:` with
    the steps (sums_worked). story_facts: who or what is where at the end of a fresh story. stories_*: the model's own
    stories, sampled at temperature 0.7.
    """
    quality = story_quality(model, tokenizer, town, n=min(n, 128), temperature=0.7, seed=seed)
    plain, worked = town.sum_probes(n, seed)[: n // 2], town.sum_probes(n, seed + 1, worked=True)[: n // 2]
    plain_right = count_matches(model, tokenizer, plain)
    worked_right = count_matches(model, tokenizer, worked, max_new_tokens=32)
    estimates = {
        "facts": exact_match(model, tokenizer, town.fact_probes(n, seed)),
        "facts_reworded": exact_match(model, tokenizer, town.fact_probes(n, seed, held_out_template=True)),
        "sums": wilson_interval(plain_right + worked_right, len(plain) + len(worked)),
        "sums_plain": wilson_interval(plain_right, len(plain)),
        "sums_worked": wilson_interval(worked_right, len(worked)),
        "story_facts": exact_match(model, tokenizer, town.story_probes(n, seed)),
        "stories_grammatical": quality.grammatical,
        "stories_consistent": quality.consistent,
        "story_sentences_right": quality.sentences_right,
    }
    return {name: asdict(estimate) for name, estimate in estimates.items()}
