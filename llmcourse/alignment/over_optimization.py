"""Over-optimization: what the true reward does while a policy moves away from its reference.

A policy trained on preferences maximizes what the preferences say, and beyond some distance from the reference that is
no longer what is wanted: the implicit reward goes on rising while the true reward falls (Gao et al., 2023; for DPO,
Rafailov et al., 2024). Where the true reward is known, both axes of that curve can be measured: `policy_probe` does so
during training.

Shapes: B rows, T positions, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.data.packing import IGNORE
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import Evaluate
from llmcourse.training.state import unwrap


def exact_token_kl(policy: Transformer, reference: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """KL(policy || reference) of the next token in nats, (B, T) float32, 0 where the target is -100.

    tokens and targets (B, T) int64. Summed over the positions of a response sampled from the policy it estimates the KL
    divergence of whole responses without bias, and with less noise than the sampled ln pi - ln pi_ref, because it
    averages over all V next tokens instead of taking the one that was drawn.
    """
    mask = targets != IGNORE  # (B, T)
    log_p = policy.head(policy.hidden_states(tokens)[mask]).float().log_softmax(dim=-1)  # (M, V)
    log_q = reference.head(reference.hidden_states(tokens)[mask]).float().log_softmax(dim=-1)
    values = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return torch.zeros(mask.shape, device=tokens.device).masked_scatter(mask, values)


@torch.no_grad()
def sampled_kl_and_reward(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[int, list[int]], float],
    *,
    stop_id: int,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One response of the policy to each prompt: KL of its positions (nats), its true reward, its length in tokens.

    Responses are drawn at temperature 1 without filters, as the KL divergence asks for; the end of the response is one
    of its tokens.

    Args:
        policy: writes the responses.
        reference: what it has moved away from.
        prompts: token ids; give each several times for several samples.
        reward: the true reward of a response, from the prompt's number and the new ids without the stop id.
        stop_id: ends a response.
        max_new_tokens: longest response.
        batch_size: rows of one batch.
        seed: of the sampling.

    Returns:
        Three float64 arrays (number of prompts,).

    Raises:
        ValueError: no prompts, a batch size below 1, a reward that is not finite, or what `generate` refuses.
    """
    if not prompts or batch_size < 1:
        raise ValueError(f"{len(prompts)} prompts, batch_size={batch_size}: give at least one of each")
    kl, rewards, lengths = [], [], []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        params = SamplingParams(temperature=1.0, max_new_tokens=max_new_tokens, seed=seed + start)
        responses = generate(policy, part, params, stop_ids=(stop_id,))
        for number, response in enumerate(responses, start):
            value = float(reward(number, response))
            if not math.isfinite(value):
                raise ValueError(
                    f"the reward of prompt {number}'s response is {value}: it must be a finite number"
                )
            rewards.append(value)
        context = policy.config.context_length
        tokens, targets = _rows(part, responses, stop_id, max_new_tokens, context)
        device = next(policy.parameters()).device
        kl.append(
            exact_token_kl(policy, reference, tokens.to(device), targets.to(device))
            .double()
            .sum(dim=-1)
            .cpu()
        )
        lengths.append((targets != IGNORE).sum(dim=-1))
    return torch.cat(kl).numpy(), np.array(rewards), torch.cat(lengths).double().numpy()


def policy_probe(
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[int, list[int]], float],
    *,
    stop_id: int,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    seed: int = 0,
) -> Evaluate:
    """An `evaluate` for `fit`: one point of the over-optimization curve, from one response to each prompt.

    Gives kl and true_reward, their standard errors kl_error and true_reward_error (over prompts), and response_length
    in tokens. The reference must be another object than the model in training: a copy of it from before. Arguments as
    in `sampled_kl_and_reward`; the same seed every time, so that neighboring points share their random numbers.
    """

    def evaluate(model: nn.Module) -> dict[str, float]:
        policy = unwrap(model)
        if policy is reference:
            raise ValueError("the reference is the model in training: give a copy.deepcopy of it made before")
        kl, rewards, lengths = sampled_kl_and_reward(
            policy,
            reference,
            prompts,
            reward,
            stop_id=stop_id,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )
        numbers = {"response_length": float(lengths.mean())}
        for name, values in (("kl", kl), ("true_reward", rewards)):
            numbers[name] = float(values.mean())
            numbers[f"{name}_error"] = _error_over_prompts(prompts, values)
        return numbers

    return evaluate


def _error_over_prompts(prompts: Sequence[Sequence[int]], values: np.ndarray) -> float:
    """Standard error of the mean; several samples of one prompt count as their mean, since they are alike."""
    of_prompt: dict[tuple[int, ...], list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        of_prompt.setdefault(tuple(prompt), []).append(float(value))
    means = [float(np.mean(some)) for some in of_prompt.values()]
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0


@dataclass(frozen=True)
class OverOptimization:
    """R(d) = start + d (alpha - beta ln d) with d = sqrt(KL): Gao et al., 2023, section 1, the form for RL."""

    start: float
    """true reward of the reference"""
    alpha: float
    """rise per unit of d at d = 1"""
    beta: float
    """how it bends; the curve turns down only if this is positive"""

    def reward(self, kl: np.ndarray) -> np.ndarray:
        """The fitted true reward at KL divergences in nats (any shape)."""
        d = np.sqrt(np.asarray(kl, dtype=float))
        return self.start + d * (self.alpha - self.beta * np.log(np.maximum(d, 1e-300)))

    @property
    def peak_kl(self) -> float:
        """KL divergence in nats at which the curve is highest, d = exp(alpha / beta - 1); infinite without a turn."""
        return math.exp(2 * (self.alpha / self.beta - 1)) if self.beta > 0 else math.inf


def fit_over_optimization(kl: Sequence[float], rewards: Sequence[float], start: float) -> OverOptimization:
    """Least-squares fit of the curve to measured points; it is linear in alpha and beta.

    Args:
        kl: KL divergence of each point in nats; points at 0 or below, where the curve is fixed, are left out.
        rewards: true reward of each point.
        start: true reward of the reference.

    Raises:
        ValueError: different numbers of both, a value that is not finite, or fewer than 3 points with a KL above 0.
    """
    if len(kl) != len(rewards):
        raise ValueError(f"{len(kl)} KL divergences and {len(rewards)} rewards: give one of each per point")
    x, y = np.asarray(kl, dtype=float), np.asarray(rewards, dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and math.isfinite(start)):
        raise ValueError("a KL divergence or reward is not finite: leave such points out")
    d = np.sqrt(x[x > 0])
    if len(d) < 3:
        raise ValueError(f"{len(d)} points with a KL above 0: two coefficients need at least 3")
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], axis=1), y[x > 0] - start, rcond=None)
    return OverOptimization(start=start, alpha=float(alpha), beta=float(beta))


def _rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    stop_id: int,
    max_new_tokens: int,
    context: int,
) -> tuple[Tensor, Tensor]:
    """Prompts and responses as tokens and targets (B, T), the stop id among the targets where the policy drew it."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        was_cut = len(response) == max_new_tokens or len(prompt) + len(response) == context
        drawn = list(response) if was_cut else [*response, stop_id]
        rows.append(([*prompt, *drawn[:-1]], [IGNORE] * (len(prompt) - 1) + drawn))
    width = max(len(tokens) for tokens, _ in rows)
    return (
        torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows]),
        torch.tensor([targets + [IGNORE] * (width - len(targets)) for _, targets in rows]),
    )
