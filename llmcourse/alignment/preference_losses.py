"""The DPO family as pure losses on log-probabilities, each written as its difference from DPO.

DPO's derivation (Rafailov et al., 2023, section 4) turns the reward of a response into its log-ratio
r = beta (ln pi(y|x) - ln pi_ref(y|x)), up to a term of the prompt that cancels between two responses of one prompt.
What is left is a classifier of pairs with the logit beta h, where h is the difference of the two log-ratios.

| loss  | what differs from DPO |
|-------|-----------------------|
| cDPO  | the label is wrong with probability `label_smoothing`: both outcomes are weighed |
| IPO   | squares instead of the logistic function: h is pulled to 1 / (2 beta), not to infinity |
| KTO   | no pairs: each response is compared with a common reference point instead of with its rival |
| SimPO | no reference: mean ln pi per token takes the log-ratio's place, and the margin must exceed gamma |
| ORPO  | no reference: log-odds take the log-ratio's place, and the chosen response is also learned by SFT |

All take and return tensors (B,) in nats; `log_probs` are ln pi(y|x) summed over the tokens of a response,
`mean_log_probs` that sum divided by their number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_MEAN_LOG_PROB = -1e-7  # the last step of float32 below p = 1, whose odds would be infinite


def log_ratio_margin(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_ref_log_probs: Tensor,
    rejected_ref_log_probs: Tensor,
) -> Tensor:
    """h = (ln pi - ln pi_ref) of the chosen minus that of the rejected response: four tensors (B,) -> (B,) in nats."""
    return (chosen_log_probs - chosen_ref_log_probs) - (rejected_log_probs - rejected_ref_log_probs)


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_ref_log_probs: Tensor,
    rejected_ref_log_probs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-ln sigmoid(beta h), (B,): Rafailov et al., 2023, eq. 7. With label smoothing e, cDPO.

    cDPO (Mitchell, 2023, eq. 3) is the cross-entropy against a label that is right with probability 1 - e:
    -(1 - e) ln sigmoid(beta h) - e ln sigmoid(-beta h). Its minimum is at beta h = ln((1 - e) / e), so that h stays
    finite. At e = 0 it is DPO.

    Args:
        chosen_log_probs: ln pi of the chosen responses, summed over tokens, (B,).
        rejected_log_probs: ln pi of the rejected responses, (B,).
        chosen_ref_log_probs: ln pi_ref of the chosen responses, (B,).
        rejected_ref_log_probs: ln pi_ref of the rejected responses, (B,).
        beta: weight of the KL divergence from the reference in the objective that DPO solves, above 0.
        label_smoothing: assumed share of wrong labels e, from 0 to below 0.5.

    Raises:
        ValueError: beta or label smoothing outside its range.
    """
    _check_beta(beta)
    h = log_ratio_margin(chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: give a share of wrong labels from 0 to below 0.5"
        )
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_ref_log_probs: Tensor,
    rejected_ref_log_probs: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """(h - 1 / (2 beta))^2, (B,): Azar et al., 2023, eq. 17, whose tau is beta here.

    DPO's loss falls for ever as h grows; this one has its minimum at h = 1 / (2 beta), however often the pair is seen.
    The equation has h of whole responses. Given mean log-probabilities in place of the sums, h is a difference per
    token: that is TRL's form, which does not let long responses dominate (`DPOSettings.length_normalized` chooses).

    Raises:
        ValueError: beta is not above 0.
    """
    _check_beta(beta)
    h = log_ratio_margin(chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs)
    return (h - 1 / (2 * beta)).square()


def kto_reference_point(mismatched_log_probs: Tensor, mismatched_ref_log_probs: Tensor) -> Tensor:
    """KTO's estimate of KL(pi || pi_ref), a scalar without gradient: max(0, mean of ln pi(y'|x) - ln pi_ref(y'|x)).

    The responses y' are those of other prompts of the batch (Ethayarajh et al., 2024, section 4): cheaper than sampling
    from pi, and biased, since they do not come from it. Both tensors (B,).
    """
    return (mismatched_log_probs - mismatched_ref_log_probs).detach().mean().clamp(min=0)


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigmoid(+-beta (ln pi - ln pi_ref - z))), (B,): + for desirable, - for undesirable responses.

    Where DPO compares a response with its rival, KTO compares it with the reference point z; and it minimizes
    1 - sigmoid instead of -ln sigmoid, whose gradient vanishes on both sides, so that a hopeless example, perhaps
    mislabelled, is given up (Ethayarajh et al., 2024, eq. 7 of the first version).

    Args:
        log_probs: ln pi of single responses, (B,).
        ref_log_probs: ln pi_ref of them, (B,).
        desirable: True for responses that are wanted, (B,) bool.
        reference_point: z, a scalar, see `kto_reference_point`.
        beta: how soon the value saturates, above 0.
        desirable_weight: w of desirable responses, at least 0.
        undesirable_weight: w of undesirable responses, at least 0.

    Raises:
        ValueError: beta or a weight outside its range.
    """
    _check_beta(beta)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        _check_not_negative(name, value)
    away = log_probs - ref_log_probs - reference_point  # (B,)
    gained = torch.where(desirable, away, -away)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * gained))


def simpo_loss(
    chosen_mean_log_probs: Tensor,
    rejected_mean_log_probs: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """-ln sigmoid(beta (chosen mean - rejected mean) - gamma), (B,): Meng et al., 2024, eq. 6.

    DPO with a uniform reference, log-probabilities per token instead of per response, and a margin gamma that the
    chosen response must win by. At gamma = 0 it is `dpo_loss` of the means with reference log-probabilities of 0.

    Raises:
        ValueError: beta is not above 0, or gamma is negative.
    """
    _check_beta(beta)
    _check_not_negative("gamma", gamma)
    return -F.logsigmoid(beta * (chosen_mean_log_probs - rejected_mean_log_probs) - gamma)


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """ln(p / (1 - p)) of p = exp(mean ln pi per token): (B,) -> (B,) (Hong et al., 2024, eq. 3 and 4).

    Means above -1e-7, whose odds float32 cannot tell from infinite, count as -1e-7 and have no gradient.
    """
    x = mean_log_probs.clamp(max=LARGEST_MEAN_LOG_PROB)
    return x - torch.log(-torch.expm1(x))


def odds_ratio_loss(chosen_mean_log_probs: Tensor, rejected_mean_log_probs: Tensor) -> Tensor:
    """-ln sigmoid(log-odds of the chosen minus those of the rejected response), (B,): Hong et al., 2024, eq. 7."""
    return -F.logsigmoid(log_odds(chosen_mean_log_probs) - log_odds(rejected_mean_log_probs))


def orpo_loss(chosen_mean_log_probs: Tensor, rejected_mean_log_probs: Tensor, *, beta: float = 0.1) -> Tensor:
    """SFT on the chosen response plus beta times the odds-ratio loss, (B,): Hong et al., 2024, eq. 6, whose lambda is
    beta.

    The odds-ratio term is `dpo_loss` with log-odds for log-ratios and beta 1. It does not hold the policy near a
    reference; the SFT term, -mean ln pi of the chosen response, takes that place, so that no SFT stage comes before.

    Raises:
        ValueError: beta is negative or not finite.
    """
    _check_not_negative("beta", beta)
    return -chosen_mean_log_probs + beta * odds_ratio_loss(chosen_mean_log_probs, rejected_mean_log_probs)


def preference_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Means over pairs, as scalars without gradient: chosen_reward, rejected_reward, margin, accuracy.

    The rewards (B,) are implicit, such as beta (ln pi - ln pi_ref). accuracy is the share of pairs whose chosen
    response has the larger one; a tie, as at the first step of DPO, counts one half (in TRL nothing).
    """
    margin = (chosen_rewards - rejected_rewards).detach()
    return {
        "chosen_reward": chosen_rewards.detach().mean(),
        "rejected_reward": rejected_rewards.detach().mean(),
        "margin": margin.mean(),
        "accuracy": (0.5 * (margin.sign() + 1)).mean(),
    }


def _check_beta(beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta={beta}: give a positive number, such as 0.1")


def _check_not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value}: give a number of at least 0")
