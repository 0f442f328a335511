"""Distance from the reference against true reward: exact KL by hand and by enumeration, the curve's fit."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from llmcourse.alignment.over_optimization import (
    OverOptimization,
    _error_over_prompts,
    exact_token_kl,
    fit_over_optimization,
    policy_probe,
    sampled_kl_and_reward,
)
from llmcourse.data.packing import IGNORE
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

V, STOP = 5, 1
CONFIG = ModelConfig(vocab_size=V, context_length=8, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8)


def new_model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(0.3)  # tied to the head: every token is likely enough to be drawn
    return model


def test_exact_kl_is_the_sum_over_the_vocabulary():
    policy, reference = new_model(0), new_model(1)
    tokens = torch.randint(V, (2, 4))
    targets = tokens.clone()
    targets[0, :2] = IGNORE
    found = exact_token_kl(policy, reference, tokens, targets)
    p, q = (model(tokens).log_softmax(-1) for model in (policy, reference))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found, expected * (targets != IGNORE), atol=1e-6)
    assert exact_token_kl(policy, copy.deepcopy(policy), tokens, targets).abs().max() == 0


@torch.no_grad()
def response_probability(model: Transformer, prompt: list[int], response: list[int]) -> float:
    log_p = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
    return math.exp(sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)))


def test_sampled_responses_give_the_kl_and_reward_of_all_responses():
    policy, reference = new_model(0), new_model(1)
    prompt, n = [2, 3], 3000
    others = [token for token in range(V) if token != STOP]
    every = [
        [STOP],
        *([a, STOP] for a in others),
        *([a, b] for a in others for b in others),
    ]  # two tokens at most
    p = np.array([response_probability(policy, prompt, response) for response in every])
    q = np.array([response_probability(reference, prompt, response) for response in every])
    assert p.sum() == pytest.approx(1, abs=1e-5)
    true_kl = float((p * np.log(p / q)).sum())
    true_length = float(sum(weight * len(response) for weight, response in zip(p, every, strict=True)))
    true_reward = float(sum(weight * (response[0] == 2) for weight, response in zip(p, every, strict=True)))
    kl, rewards, lengths = sampled_kl_and_reward(
        policy,
        reference,
        [prompt] * n,
        lambda number, response: float(response[:1] == [2]),
        stop_id=STOP,
        max_new_tokens=2,
        batch_size=1000,
    )
    for values, truth in ((kl, true_kl), (rewards, true_reward), (lengths, true_length)):
        assert len(values) == n
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(n)
    assert true_kl > 10 * kl.std() / math.sqrt(n)  # so the comparison can fail


def test_probe_gives_a_point_of_the_curve():
    policy = new_model(0)
    reference = copy.deepcopy(policy)
    numbers = []

    def reward(number: int, response: list[int]) -> float:
        numbers.append(number)
        return float(len(response))

    probe = policy_probe(reference, [[2, 3], [4], [2]], reward, stop_id=STOP, max_new_tokens=3, batch_size=2)
    start = probe(policy)
    assert set(start) == {"kl", "kl_error", "true_reward", "true_reward_error", "response_length"}
    assert start["kl"] == 0 and numbers == [0, 1, 2]
    with torch.no_grad():
        policy.head.weight.add_(torch.randn_like(policy.head.weight))
    assert probe(policy)["kl"] > 0.05
    assert probe(policy) == probe(policy)
    with pytest.raises(ValueError, match="copy"):
        probe(reference)


def test_samples_of_one_prompt_are_no_independent_prompts():
    values = np.array([1.0, 3.0, 2.0, 6.0])
    assert _error_over_prompts([[1], [1], [2], [2]], values) == pytest.approx(np.std([2, 4], ddof=1) / 2**0.5)
    assert _error_over_prompts([[1], [2], [3], [4]], values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert _error_over_prompts([[1], [1]], values[:2]) == 0


def test_fit_recovers_the_curve_and_its_peak():
    truth = OverOptimization(start=0.5, alpha=1.5, beta=0.8)
    kl = np.array([0.0, 0.1, 0.5, 2.0, 6.0, 15.0])
    rewards = truth.reward(kl)
    assert rewards[0] == 0.5
    found = fit_over_optimization(kl, rewards, 0.5)
    assert (found.alpha, found.beta) == (pytest.approx(1.5), pytest.approx(0.8))
    fine = np.linspace(0.01, 30, 300_001)
    assert found.peak_kl == pytest.approx(fine[truth.reward(fine).argmax()], abs=2e-2)
    rising = fit_over_optimization([1.0, 4.0, 9.0], [1.0, 2.2, 3.6], 0.0)
    assert rising.beta < 0 and rising.peak_kl == math.inf


def test_one_value_by_hand():
    # d = 2: 1 + 2 (0.5 - 0.25 ln 2) = 1.653426
    assert OverOptimization(1.0, 0.5, 0.25).reward(np.array(4.0)) == pytest.approx(1.653426, abs=1e-6)


def test_errors():
    policy, reference = new_model(0), new_model(1)
    for prompts, size in (([], 1), ([[2]], 0)):
        with pytest.raises(ValueError, match="at least one of each"):
            sampled_kl_and_reward(policy, reference, prompts, lambda *_: 0.0, stop_id=STOP, batch_size=size)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a finite number"):
            sampled_kl_and_reward(policy, reference, [[2]], lambda *_, bad=bad: bad, stop_id=STOP)
    with pytest.raises(ValueError, match="3 KL divergences and 2 rewards"):
        fit_over_optimization([1, 2, 3], [1, 2], 0.0)
    with pytest.raises(ValueError, match="not finite"):
        fit_over_optimization([1, 2, math.nan], [1, 2, 3], 0.0)
    with pytest.raises(ValueError, match="2 points"):
        fit_over_optimization([0, 2, 3], [1, 2, 3], 0.0)
