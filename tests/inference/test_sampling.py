"""Sampling: exact probabilities on small logits, frequencies of draws, the order of the filters, refusals.

Most cases use the distribution (0.5, 0.25, 0.15, 0.1), whose logits are its logarithms.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from llmcourse.inference.sampling import (
    SamplingParams,
    filtered_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

P = (0.15, 0.5, 0.1, 0.25)  # not in order, so that sorting has something to undo


def logits() -> Tensor:
    return torch.tensor([P]).log()


def probabilities(**params: float) -> list[float]:
    return filtered_logits(logits(), SamplingParams(**params)).softmax(-1)[0].tolist()


def test_temperature_one_changes_nothing():
    assert probabilities() == pytest.approx(P)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_temperature_takes_the_power(temperature):
    # softmax(ln p / tau) is p^(1/tau), normalized
    powers = [p ** (1 / temperature) for p in P]
    assert probabilities(temperature=temperature) == pytest.approx([x / sum(powers) for x in powers])


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, (0, 1, 0, 0)), (2, (0, 2 / 3, 0, 1 / 3)), (3, (1 / 6, 5 / 9, 0, 5 / 18)), (4, P), (9, P), (0, P)],
)
def test_top_k(k, expected):
    assert probabilities(top_k=k) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, {1}),  # the likeliest always stays
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {0, 1, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_p(p, kept):
    found = probabilities(top_p=p)
    mass = sum(P[i] for i in kept)
    assert found == pytest.approx([P[i] / mass if i in kept else 0 for i in range(4)], abs=1e-6)


def test_top_p_counts_exact_ties_of_the_border():
    # 1/2 + 1/4 is exactly 3/4 in binary, so the third token is not needed for p = 0.75
    kept = keep_top_p(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 0.75)
    assert torch.isfinite(kept).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.0, {0, 1, 2, 3}), (0.19, {0, 1, 2, 3}), (0.21, {0, 1, 3}), (0.31, {1, 3}), (0.51, {1})],
)
def test_min_p_compares_with_the_likeliest(fraction, kept):
    found = probabilities(min_p=fraction)
    mass = sum(P[i] for i in kept)
    assert found == pytest.approx([P[i] / mass if i in kept else 0 for i in range(4)], abs=1e-6)
    assert keep_min_p(logits(), 1.0).isfinite().sum() == 1  # 1 keeps the likeliest itself


def test_filters_see_the_tempered_distribution_and_one_another():
    # at tau = 1/2 the squares are (.0225, .25, .01, .0625) / .345: the likeliest has .725 and alone reaches p = .7
    assert probabilities(temperature=0.5, top_p=0.7) == pytest.approx([0, 1, 0, 0], abs=1e-6)
    assert probabilities(top_p=0.7)[3] > 0
    # top-k 2 leaves (2/3, 1/3), of which the first alone reaches p = 0.6; on its own p = 0.6 keeps two
    assert probabilities(top_k=2, top_p=0.6) == pytest.approx([0, 1, 0, 0], abs=1e-6)
    assert probabilities(top_p=0.6)[3] > 0
    # temperature 2 brings the ratio .1 / .5 up to sqrt(.2) = .447, above min_p = .4
    assert probabilities(temperature=2.0, min_p=0.4)[2] > 0
    assert probabilities(min_p=0.4)[2] == 0


def test_rows_are_independent():
    rows = torch.stack((logits()[0], logits()[0].flip(0), torch.zeros(4)))
    for keep in (lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.6), lambda x: keep_min_p(x, 0.3)):
        for row, alone in zip(keep(rows), rows, strict=True):
            assert torch.equal(row, keep(alone[None])[0])
    assert keep_top_k(torch.zeros(1, 4), 2).isfinite().all()  # ties with the k-th stay


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 1, "temperature": 3.0}])
def test_greedy_takes_the_likeliest_and_draws_nothing(params):
    settings = SamplingParams(**params)
    state = torch.get_rng_state()
    chosen = sample(torch.cat((logits(), logits().flip(1))), settings)
    assert settings.greedy and chosen.tolist() == [1, 2] and chosen.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert not SamplingParams().greedy


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.25}],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    n = 20_000
    expected = torch.tensor(probabilities(**params), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    drawn = sample(logits().expand(n, 4), SamplingParams(**params), generator)
    counts = torch.bincount(drawn, minlength=4).double()
    possible = expected > 0
    assert not counts[~possible].any()
    # under the right distribution a p-value below 1e-3 comes once in a thousand seeds; the seed is fixed
    expected = expected[possible] / expected[possible].sum()
    assert chisquare(counts[possible].numpy(), n * expected.numpy()).pvalue > 1e-3
    if params:  # and the test has the power to see that the parameter was ignored
        plain = torch.tensor(P, dtype=torch.float64)
        assert chisquare(counts.numpy(), n * plain.numpy() / plain.sum().item()).pvalue < 1e-6


def test_a_generator_makes_draws_repeatable():
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return sample(logits().expand(50, 4), SamplingParams(), generator).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_half_precision_logits_are_filtered_in_float32():
    assert filtered_logits(logits().bfloat16(), SamplingParams(temperature=0.7)).dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
        {"stop": "end"},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError) as error:
        SamplingParams(**change)
    assert str(error.value).startswith(f"{name}={value!r}") and "give" in str(error.value)
