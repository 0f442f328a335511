"""Policy gradients on log-probabilities: advantages, the clipped objective, estimates of the KL divergence.

Nothing here knows a model. PPO's clipped surrogate is the common core; GRPO, DAPO, Dr. GRPO and GSPO are settings of
it, which differ in where advantages come from, in what the ratio is taken over, in how far it may go, and in how
tokens are averaged.

Shapes: B responses, G groups, N responses of a group (B = G N), T positions. `mask` (B, T) is 1 at the positions whose
next token the policy wrote; every other tensor may hold any finite number elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
RATIO_LEVELS = ("token", "sequence")
AVERAGES = ("sequence", "token", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a policy gradient maximizes; the defaults are GRPO's (Shao et al., 2024).

    Raises:
        ValueError: a value outside its range, or an unknown name.
    """

    scale: str = "group"
    """what centered rewards are divided by: group (their group's standard deviation), batch, or none"""
    ratio: str = "token"
    """ratio of new to old policy of each token, or of the sequence: the geometric mean over its tokens"""
    clip_low: float = 0.2
    """the ratio earns nothing more below 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio earns nothing more above 1 + clip_high"""
    average: str = "sequence"
    """sequence: mean over a response's tokens, then over responses; token: over all tokens; constant: sum /
    max_length"""
    max_length: int = 1
    """tokens that `average="constant"` divides each response by, whatever its own length"""
    kl_weight: float = 0.0
    """beta, weight of the KL divergence from the reference policy, in 1 / nat"""
    kl_estimator: str = "k3"
    """k1, k2 or k3 (Schulman, 2020)"""
    kl_corrected: bool = False
    """weigh the estimate by the ratio, which makes the gradient that of the KL itself (DeepSeek-V3.2, 2025)"""

    def __post_init__(self) -> None:
        choices = {"scale": SCALES, "ratio": RATIO_LEVELS, "average": AVERAGES, "kl_estimator": KL_ESTIMATORS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: a ratio is positive, give 0 to 1")
        for name in ("clip_high", "kl_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: give a number of at least 0")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: give at least 1")


def grpo(*, clip: float = 0.2, kl_weight: float = 0.04) -> Objective:
    """Group relative policy optimization (Shao et al., 2024, eq. 3): symmetric clip, mean by sequence, KL in the
    loss."""
    return Objective(clip_low=clip, clip_high=clip, kl_weight=kl_weight)


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """DAPO (Yu et al., 2025, eq. 8): GRPO with more room upwards, every token weighted alike, and no KL term."""
    return Objective(clip_low=clip_low, clip_high=clip_high, average="token")


def dr_grpo(*, max_length: int, clip: float = 0.2) -> Objective:
    """Dr. GRPO (Liu et al., 2025, section 3.2): GRPO without the two divisions that bias it, by length and by
    spread."""
    return Objective(scale="none", clip_low=clip, clip_high=clip, average="constant", max_length=max_length)


def gspo(*, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO (Zheng et al., 2025, eq. 5 and 7): GRPO with one ratio a sequence, hence with a clip far closer to 1."""
    return Objective(ratio="sequence", clip_low=clip_low, clip_high=clip_high)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str = "group", epsilon: float = 1e-4
) -> Tensor:
    """Advantages (B,) float32 of rewards (B,) whose groups of `group_size` stand side by side.

    A_i = (r_i - mean of its group) / (standard deviation + epsilon) (Shao et al., 2024, section 4.1.2); the deviation
    is the sample's (N - 1). `scale="none"` leaves the division out (Liu et al., 2025): A_i is then (N - 1) / N times
    the leave-one-out advantage of RLOO (Ahmadian et al., 2024). A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: groups of one, a number of rewards that is no multiple of `group_size`, a reward that is not finite,
            or an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a response is compared with others, give at least 2")
    if rewards.ndim != 1 or len(rewards) % group_size or not len(rewards):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not divide into groups of {group_size}")
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"reward {int((~rewards.isfinite()).nonzero()[0])} is not finite: mend the reward")
    grouped = rewards.float().view(-1, group_size)  # (G, N)
    # the mean of equal numbers may be off by a rounding, which the division would blow up
    centered = (grouped - grouped.mean(dim=1, keepdim=True)).masked_fill(constant_groups(grouped)[:, None], 0)
    if scale == "none":
        return centered.flatten()
    spread = grouped.std(dim=1, keepdim=True) if scale == "group" else grouped.std()
    return (centered / (spread + epsilon)).flatten()


def constant_groups(grouped: Tensor) -> Tensor:
    """Which rows of rewards (G, N) hold one value only, (G,) bool: such a group teaches nothing."""
    return (grouped == grouped[:, :1]).all(dim=1)


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """ln of new over old policy: of each token (B, T), or at level "sequence" the mean over its tokens (B, 1).

    The sequence's is the length-normalized ratio of Zheng et al. (2025, eq. 7). Both are 0 outside the mask.
    """
    difference = (log_probs - old_log_probs) * mask
    if level == "token":
        return difference
    return difference.sum(dim=1, keepdim=True) / _lengths(mask)[:, None]


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """PPO's -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), elementwise (Schulman et al., 2017, eq. 7).

    `log_ratio` is (B, T) or (B, 1). `advantages` are (B, T) from a critic, as in PPO, or (B, 1): one number for all
    tokens of a response, as in GRPO. Returned shape: the two broadcast. The minimum bounds the gain only: a ratio that
    has gone the wrong way keeps its gradient.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Where `clipped_surrogate` has no gradient, because the ratio already went as far as it pays (bool)."""
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference) in nats from tokens that the policy drew, elementwise (Schulman, 2020).

    With d = ln policy - ln reference of the token drawn: k1 = d is unbiased, and negative for half of the tokens;
    k2 = d^2 / 2 is biased by third order, with little variance; k3 = exp(-d) - 1 + d is unbiased and never negative.

    That speaks of values. As a loss, only the gradient counts, and there (Tang and Munos, 2025): the expected gradient
    of k1 is 0, so it does nothing but add noise; that of k2 is the KL's own; that of k3, which GRPO uses (Shao et
    al., 2024, eq. 4), is the gradient of KL(reference || policy). Weighed by the ratio of new to old policy, k1 and k3
    have the KL's own gradient too, also off the policy (`Objective.kl_corrected`). All this is for one token after
    tokens already drawn: how these tokens change what comes later is left out.

    Raises:
        ValueError: an unknown estimator.
    """
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"estimator={estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def sum_and_count(
    values: Tensor, mask: Tensor, average: str = "sequence", max_length: int = 1
) -> tuple[Tensor, Tensor]:
    """A sum over values (B, T) or (B, 1) and the number to divide it by, both scalars.

    The division is left to the caller, so that parts of a batch (micro-batches, processes) add up to the whole.
    sequence: sum over responses of their token means, over B responses that have tokens (Shao et al., 2024, eq. 3):
    a token of a long response counts less. token: over all tokens (Yu et al., 2025): a long response counts more.
    constant: over B `max_length` (Liu et al., 2025): a token counts the same whatever its response, and its batch.

    Raises:
        ValueError: an unknown average.
    """
    masked = torch.where(
        mask.bool(), values, 0.0
    )  # (B, T); where, not *, since 0 times infinity is no number
    if average == "token":
        return masked.sum(), mask.sum()
    if average == "constant":
        return masked.sum(), mask.new_tensor(len(mask) * max_length)
    if average == "sequence":
        return (masked.sum(dim=1) / _lengths(mask)).sum(), (mask.sum(dim=1) > 0).sum()
    raise ValueError(f"average={average!r}: choose one of {', '.join(AVERAGES)}")


def policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Summed loss of rollouts, the number to divide it by, and metrics: the negative of Shao et al. (2024), eq. 3.

    Args:
        log_probs: (B, T) ln p of the tokens written, under the policy in training.
        advantages: (B,), (B, 1) or (B, T).
        mask: (B, T) bool or number.
        objective: which of the family.
        old_log_probs: (B, T) the same under the policy that wrote them; `None` says that it is this one, and the ratio
            is 1 with the gradient of ln p: the ordinary policy gradient.
        ref_log_probs: (B, T) the same under the reference policy; needed if `objective.kl_weight` is above 0.

    Raises:
        ValueError: a KL weight without reference log-probs.
    """
    mask = mask.to(log_probs.dtype)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    log_ratio = log_ratios(log_probs, old_log_probs, mask, objective.ratio)
    clip = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
    values = clipped_surrogate(log_ratio, advantages, **clip)  # (B, T) or (B, 1)
    with torch.no_grad():
        metrics = {
            "clipped": _token_mean(is_clipped(log_ratio, advantages, **clip).float(), mask),
            "surprisal": _token_mean(-log_probs, mask),
        }
    if objective.kl_weight and ref_log_probs is None:
        raise ValueError(f"kl_weight={objective.kl_weight} needs ref_log_probs: pass those of the reference")
    if ref_log_probs is not None:
        kl = kl_estimate(log_probs, ref_log_probs, objective.kl_estimator)
        metrics["kl"] = _token_mean(kl.detach(), mask)
        weight = objective.kl_weight * (log_ratio.exp() if objective.kl_corrected else 1.0)
        if objective.kl_weight:
            values = values + weight * kl
    total, count = sum_and_count(values, mask, objective.average, objective.max_length)
    return total, count, metrics


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each response (B,), 1 for none, to divide by."""
    return mask.sum(dim=1).clamp(min=1)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    total, count = sum_and_count(values, mask, "token")
    return total / count.clamp(min=1)
