"""Test-time compute: votes and estimators by hand and by enumeration, budget forcing on a model whose habits are
known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference import test_time as module
from llmcourse.inference.test_time import (
    Sample,
    accuracy_against_tokens,
    best_of_n,
    budget_forced,
    majority_vote,
    pass_at_k,
    sample_many,
    weighted_vote,
)
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

V, CONTEXT, STOP = 13, 24, 0


class Letters:
    """A codec of one character a token: id 0 ends a text, ids from 1 are "a", "b", ..."""

    eos_id = STOP

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 96 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 96) for i in ids if i)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V,
        context_length=CONTEXT,
        d_model=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_ff=16,
        tie_embeddings=False,
    )
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def counter() -> Transformer:
    """A model without attention that writes the next letter after each, and stops after "h" (8)."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V,
        context_length=CONTEXT,
        d_model=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_ff=16,
        tie_embeddings=False,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(V, 16))
        model.head.weight.zero_()
        for token in range(V):
            follower = STOP if token == 8 else (token + 1) % V
            model.head.weight[follower, token] = 5.0
    return model


GREEDY = SamplingParams(temperature=0.0, max_new_tokens=3)
LETTERS = Letters()


def force(model: Transformer, text: str, **changes: Any) -> Sample:
    options = {"budget": 20, "closing": LETTERS.encode("a")} | changes
    return budget_forced(model, LETTERS, [LETTERS.encode(text)], GREEDY, **options)[0]


def test_budget_that_suffices_changes_nothing(counter: Transformer):
    assert force(counter, "c") == Sample((4, 5, 6, 7, 8), "defgh", 6)  # five letters and the stop


def test_budget_too_small_writes_the_closing_words_and_answers(counter: Transformer):
    # two letters of thinking, "a" from us, then three tokens of answer
    assert force(counter, "c", budget=2) == Sample((4, 5, 1, 2, 3, 4), "deabcd", 5)


def test_budget_exactly_at_the_stop(counter: Transformer):
    assert force(counter, "c", budget=5).text == "defgh" + "abcd"  # the stop would have been the sixth token
    assert force(counter, "c", budget=6).text == "defgh"


def test_extension_replaces_the_stop(counter: Transformer):
    waiting = LETTERS.encode("f")
    once = force(counter, "f", waiting=waiting, extensions=1)
    assert once == Sample((7, 8, 6, 7, 8), "ghfgh", 6)  # gh, stop thrown away, f from us, gh, stop
    twice = force(counter, "f", waiting=waiting, extensions=2)
    assert twice.text == "ghfghfgh" and twice.n_tokens == 9
    # of 4 tokens, gh and f leave one: the response is cut there and made to answer
    assert force(counter, "f", waiting=waiting, extensions=2, budget=4).text == "ghfg" + "abcd"
    assert force(counter, "f", waiting=waiting, extensions=2, budget=3).text == "gh"  # no room to wait


def test_budget_forcing_ends_at_the_context(counter: Transformer):
    prompt = LETTERS.encode("a" * (CONTEXT - 2))
    (sample,) = budget_forced(counter, LETTERS, [prompt], GREEDY, budget=9, closing=[1])
    assert sample.text == "bc"
    (sample,) = budget_forced(counter, LETTERS, [prompt[:-1]], GREEDY, budget=1, closing=[1])
    assert sample.text == "b" + "a" + "b"  # the answer got the last place


def test_budget_forcing_in_a_batch_is_that_of_each_alone(counter: Transformer):
    prompts = [LETTERS.encode(text) for text in ("c", "f", "aah", "b")]
    options = {"budget": 4, "closing": [1], "waiting": [6], "extensions": 2}
    together = budget_forced(counter, LETTERS, prompts, GREEDY, **options)
    alone = [budget_forced(counter, LETTERS, [p], GREEDY, **options)[0] for p in prompts]
    assert together == alone and len({sample.text for sample in together}) == 4


def test_samples_are_in_the_order_of_the_prompts_and_count_the_stop(model: Transformer):
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    params = SamplingParams(max_new_tokens=6, seed=1)
    stops = (2, 3, 5)
    samples = sample_many(model, LETTERS, prompts, 5, params, stop_ids=stops, batch_size=4)
    assert [len(row) for row in samples] == [5, 5, 5]
    flat = [sample for row in samples for sample in row]
    assert {sample.n_tokens - len(sample.ids) for sample in flat} == {0, 1}
    assert all(sample.n_tokens == min(6, len(sample.ids) + 1) for sample in flat)
    assert all(sample.text == LETTERS.decode(sample.ids) for sample in flat)
    assert len({sample.ids for sample in flat}) > 10
    again = sample_many(model, LETTERS, prompts, 5, params, stop_ids=stops, batch_size=4)
    assert samples == again  # the seed decides
    greedy = sample_many(model, LETTERS, prompts, 1, GREEDY)
    assert [list(row[0].ids) for row in greedy] == generate(model, prompts, GREEDY, stop_ids=(STOP,))


def test_votes_by_hand():
    assert majority_vote(["a", "b", "b", None, None, None]) == "b"
    assert majority_vote(["b", "a", "a", "b"]) == "b"  # the first of equals
    assert majority_vote([None]) is None and majority_vote([]) is None
    assert weighted_vote([1, 2, 2], [0.9, 0.3, 0.3]) == 1
    assert weighted_vote([1, 2, 2], [0.5, 0.3, 0.3]) == 2
    assert best_of_n([0.1, 0.7, 0.7, -1]) == 1


@pytest.mark.parametrize(("n", "right"), [(5, 0), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_chen_2021_eq_1_counts_the_sets(n: int, right: int):
    for k in range(1, n + 1):
        sets = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(min(one) < right for one in sets) / len(sets))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 6, 3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_curve_against_enumeration_of_all_sets():
    answers = [[7, 7, 5, None, 5, 7], [1, 2, 2, 3, 2, 1]]
    truths, scores = [7, 1], [[0.1, 0.9, 0.5, 0.3, 0.8, 0.2], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]]
    n_tokens = [[1, 2, 3, 4, 5, 6], [2] * 6]
    points = accuracy_against_tokens(answers, truths, n_tokens, [1, 3, 6], scores=scores, draws=4000)
    for point in points:
        assert point.tokens.tolist() == [3.5 * point.k, 2.0 * point.k]
        for p in range(2):
            orders = list(itertools.permutations(range(6), point.k))
            votes = np.mean([majority_vote([answers[p][i] for i in one]) == truths[p] for one in orders])
            best = np.mean([answers[p][max(one, key=lambda i: scores[p][i])] == truths[p] for one in orders])
            assert point.majority[p] == pytest.approx(votes, abs=0.03)  # four standard errors of 4000 draws
            assert point.best is not None and point.best[p] == pytest.approx(best, abs=0.03)
            right = sum(answer == truths[p] for answer in answers[p])
            assert point.any_right[p] == pytest.approx(pass_at_k(6, right, point.k))
    # one sample is one sample, however it is chosen
    assert points[0].majority.tolist() == points[0].best.tolist()  # type: ignore[union-attr]
    assert points[2].best.tolist() == [1, 1]  # type: ignore[union-attr]


def test_curve_without_scores_has_no_best_and_its_seed_decides():
    table = ([["a", "b", "a"]], ["a"], [[1, 1, 1]], [2])
    first, second = (accuracy_against_tokens(*table, draws=9, seed=seed)[0] for seed in (0, 1))
    assert first.best is None and first.majority != second.majority
    assert first.majority == accuracy_against_tokens(*table, draws=9, seed=0)[0].majority


TABLE: tuple[Any, ...] = ([["a", "b"]], ["a"], [[1, 1]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sample_many(m, LETTERS, [[1]], 0, GREEDY), "n=0"),
        (lambda m: sample_many(m, LETTERS, [[1]], 1, GREEDY, batch_size=0), "batch_size=0"),
        (lambda m: sample_many(m, LETTERS, [[1]], 2, GREEDY), "n=2 greedy"),
        (lambda m: force(m, "a", budget=0), "budget=0"),
        (lambda m: force(m, "a", extensions=1), "extensions=1 need"),
        (
            lambda m: budget_forced(m, LETTERS, [[1]], SamplingParams(stop=("a",)), budget=1, closing=[1]),
            "needs stop ids",
        ),
        (lambda m: weighted_vote(["a"], []), "0 weights for 1 answers"),
        (lambda m: weighted_vote(["a"], [math.nan]), "score 0 is nan"),
        (lambda m: best_of_n([]), "best of no sample"),
        (lambda m: best_of_n([1, math.inf]), "score 1 is inf"),
        (lambda m: pass_at_k(3, 4, 1), "n_right=4"),
        (lambda m: pass_at_k(3, 1, 4), "k=4"),
        (lambda m: pass_at_k(3, 1, 0), "k=0"),
        (lambda m: accuracy_against_tokens(*TABLE, [3]), "k=3"),
        (lambda m: accuracy_against_tokens(*TABLE, [1], draws=0), "draws=0"),
        (lambda m: accuracy_against_tokens([["a"]], [], [[1]], [1]), "0 truths for 1 problems"),
        (lambda m: accuracy_against_tokens([], [], [], [1]), "0 truths for 0 problems"),
        (lambda m: accuracy_against_tokens([["a", "b"]], ["a"], [[1]], [1]), r"rows of \[1, 2\]"),
        (lambda m: accuracy_against_tokens(*TABLE, [1], scores=[[1.0]]), r"rows of \[1, 2\]"),
        (lambda m: accuracy_against_tokens(*TABLE, [1], scores=[[math.nan] * 2]), "is nan"),
    ],
)
def test_refusals(model: Transformer, call: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_room_for_a_response(model: Transformer):
    params = SamplingParams(max_new_tokens=6)
    assert module.room_for(model, [1] * 4, params) == 6
    assert module.room_for(model, [1] * (CONTEXT - 2), params) == 2
