"""Speculative decoding: the model's own tokens if greedy, its own distribution if not; drafters; counts."""

from __future__ import annotations

import pytest
import torch

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.speculative import (
    ModelDrafter,
    NGramDrafter,
    PromptLookup,
    expected_tokens,
    speculative_generate,
    target_distribution,
    verify,
)
from tests.inference.small import CONTEXT, V, lively_model, some_prompts

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(lively_model())


class Fixed:
    """Proposes what it is told, or what the model will say, with some mistakes."""

    def __init__(self, answer: list[int], n_prompt: int, every: int) -> None:
        self.answer, self.n_prompt, self.every = answer, n_prompt, every

    def propose(self, ids, n):
        done = len(ids) - self.n_prompt
        found = self.answer[done : done + n]
        return [
            (token + 1) % V if (done + i) % self.every == 0 else token for i, token in enumerate(found)
        ], None


@pytest.mark.parametrize("n_draft", [1, 3, 7])
@pytest.mark.parametrize("drafter", ["lookup", "ngram", "model", "same model", "mistakes"])
def test_greedy_tokens_are_the_models_own(runner, drafter, n_draft):
    for prompt in some_prompts(4, seed=1):
        (expected,) = generate(runner.model, [prompt], GREEDY)
        made = {
            "lookup": lambda: PromptLookup(),
            "ngram": lambda expected=expected, prompt=prompt: NGramDrafter([expected, prompt], least=1),
            "model": lambda: ModelDrafter(ModelRunner(lively_model(seed=2, n_layers=1)), GREEDY),
            "same model": lambda: ModelDrafter(runner, GREEDY),
            "mistakes": lambda expected=expected, prompt=prompt: Fixed(expected, len(prompt), 3),
        }[drafter]()
        found = speculative_generate(runner, prompt, GREEDY, made, n_draft=n_draft)
        assert found.new_ids == expected
        assert found.passes + found.accepted >= len(expected)
        if drafter == "same model":
            assert found.accepted == found.proposed and found.tokens_per_pass > 0.9 * min(n_draft + 1, 30)


def test_stop_ids_and_a_full_context(runner):
    prompt = some_prompts(1, seed=4)[0]
    (expected,) = generate(runner.model, [prompt], GREEDY)
    found = speculative_generate(runner, prompt, GREEDY, ModelDrafter(runner, GREEDY), stop_ids=[expected[5]])
    assert found.new_ids == expected[: expected.index(expected[5])]
    long = [1] * (CONTEXT - 4)
    found = speculative_generate(runner, long, GREEDY, ModelDrafter(runner, GREEDY), n_draft=6)
    assert found.new_ids == generate(runner.model, [long], GREEDY)[0] and len(found.new_ids) == 4


@pytest.mark.parametrize("kind", ["a model", "another temperature", "certain"])
def test_what_comes_out_is_distributed_as_the_model_says(kind):
    """Chi-square of 20 000 first tokens against p; with the drafter's own q the statistic would be in the thousands."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0.9, top_k=8)
    logits = 2 * torch.randn(2, 12, generator=generator)
    p = target_distribution(logits, params)
    q = (
        (torch.randn(1, 12, generator=generator)).softmax(-1)
        if kind == "a model"
        else p[:1].sqrt().softmax(-1)
    )
    counts, n, accepted = torch.zeros(12), 20_000, 0
    for _ in range(n):
        draft = 3 if kind == "certain" else int(torch.multinomial(q[0], 1, generator=generator))
        kept, last = verify(logits, [draft], None if kind == "certain" else q, params, generator)
        accepted += kept
        counts[draft if kept else last] += 1
    possible = p[0] > 0
    assert not counts[~possible].any()
    chi_square = ((counts - n * p[0]) ** 2 / (n * p[0]))[possible].sum()
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    expected = (
        p[0, 3] if kind == "certain" else torch.minimum(p[0], q[0]).sum()
    )  # Leviathan et al., 2023, theorem 3.5
    assert abs(accepted / n - float(expected)) < 4 * 0.5 / n**0.5


def test_the_token_behind_the_drafts_is_drawn_from_the_last_row():
    logits = torch.full((3, 5), -20.0)
    logits[0, 1] = logits[1, 2] = logits[2, 4] = 20.0
    assert verify(logits, [1, 2], None, SamplingParams()) == (2, 4)
    assert verify(logits, [1, 3], None, SamplingParams()) == (1, 2)
    assert verify(logits, [], None, GREEDY) == (0, 1)


def test_a_seed_repeats_sampled_text(runner):
    prompt = some_prompts(1, seed=4)[0]

    def sampled(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=20, seed=seed)
        return speculative_generate(runner, prompt, params, PromptLookup()).new_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_prompt_lookup_by_hand():
    ids = [5, 6, 7, 8, 5, 6, 9, 1, 5, 6]
    assert PromptLookup().propose(ids, 3) == ([9, 1, 5], None), "the latest occurrence of 5 6"
    assert PromptLookup(longest=1).propose(ids, 2) == ([9, 1], None)
    assert PromptLookup(shortest=3).propose(ids, 3) == ([], None)
    assert PromptLookup().propose([1], 3) == ([], None)
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        PromptLookup(longest=1, shortest=2)


def test_n_grams_by_hand():
    drafter = NGramDrafter([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5], [9, 3, 4], [8, 3, 4]], order=3, least=2)
    assert drafter.propose([1, 2], 2) == ([3, 5], None), "after 2 3 comes 5 twice and 4 once"
    assert drafter.propose([7, 3], 1) == ([4], None), "7 3 was never seen; after 3 comes 4 most often"
    assert drafter.propose([9], 3) == ([], None), "3 was seen once after 9"
    with pytest.raises(ValueError, match="order=1"):
        NGramDrafter([], order=1)


def test_expected_tokens_of_a_pass():
    assert expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1
    with pytest.raises(ValueError, match="acceptance=1.5"):
        expected_tokens(1.5, 2)


@pytest.mark.parametrize(
    ("prompt", "n_draft", "message"),
    [
        ([], 2, "prompt is empty"),
        ([1] * CONTEXT, 2, f"context holds {CONTEXT}"),
        ([1], 0, "n_draft=0: give at least 1"),
    ],
)
def test_refusals(runner, prompt, n_draft, message):
    with pytest.raises(ValueError, match=message):
        speculative_generate(runner, prompt, GREEDY, PromptLookup(), n_draft=n_draft)
