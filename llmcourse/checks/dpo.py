"""Exercises of chapter 14, direct preference optimization: log-probabilities of responses, the losses, their gradients.

Shapes: B pairs (or responses), T time, V vocabulary. Log-probabilities are in nats, summed over a response's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmcourse.alignment import log_probs as response
from llmcourse.alignment import preference_losses as losses
from llmcourse.checks.exercise import Case, Exercise, Mutant

FAR = 150.0  # nats: exp(-FAR) is 0 in float32


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_policy_gradients(*policy: int) -> Callable[[Callable[..., Any], Case], dict[str, Any]]:
    """A `run` that also gives the gradients of the weighted losses with respect to the arguments of these numbers.

    Only the policy's log-probabilities need a gradient: whether the reference's are detached is nobody's business.
    """

    def run(answer: Callable[..., Any], case: Case) -> dict[str, Any]:
        args = [value.requires_grad_() if i in policy else value for i, value in enumerate(case.args)]
        value = answer(*args, **case.kwargs)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return {"value": value, "gradients": "none: the loss is cut off from the gradient"}
        weights = torch.arange(1.0, value.numel() + 1).view(value.shape)
        inputs = [args[i] for i in policy]
        found = torch.autograd.grad((weights * value).sum(), inputs, allow_unused=True)
        gradients = [
            torch.zeros_like(x) if gradient is None else gradient
            for x, gradient in zip(inputs, found, strict=True)
        ]
        return {"value": value.detach(), "gradients": gradients}

    return run


def _four(seed: int, b: int, spread: float = 6.0) -> tuple[Tensor, ...]:
    """Log-probabilities (B,) of chosen and rejected responses, and of both under the reference."""
    g = _generator(seed)
    policy = [-30 + spread * torch.randn(b, generator=g) for _ in range(2)]
    return (*policy, *(value + 3 * torch.randn(b, generator=g) for value in policy))


def _log_ratios(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor) -> Tensor:
    return (chosen - chosen_ref) - (rejected - rejected_ref)


# --- log-probabilities of responses -----------------------------------------------------------------------------


def response_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """ln pi(y|x) of each row's response and its number of tokens, by the package's `token_log_probs`.

    Args:
        logits: (B, T, V); position t holds the prediction of `targets[:, t]`, so nothing is left to shift.
        targets: (B, T) int64; -100 where the next token is not part of the response.

    Returns:
        Summed log-probabilities (B,) float32 in nats, and counts of targets (B,) int64.
    """
    return response.token_log_probs(logits, targets).sum(dim=-1), response.response_lengths(targets)


def _logit_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    cases = []
    for b, t, v in ((2, 5, 3), (3, 9, 7)):
        logits = 2 * torch.randn(b, t, v, generator=g)
        targets = torch.randint(v, (b, t), generator=g)
        for row in range(b):
            targets[row, : 1 + row] = -100  # the prompt
            targets[row, t - 1 - row :] = -100  # padding
        cases.append(Case((logits, targets), name=f"{b} rows with prompt and padding"))
    logits, targets = (value.clone() for value in cases[0].args)
    place = (0, 1, int(targets[0, 1]))
    logits[place] = logits[0, 1].max() - FAR
    return [*cases, Case((logits, targets), name="a response with a very unlikely token")]


def _sums_with(
    *,
    mask: bool = True,
    normalize: str = "log_softmax",
    reduce: str = "sum",
    sign: int = 1,
    count: str = "targets",
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        is_target = targets != -100
        values = {
            "log_softmax": lambda: logits.log_softmax(dim=-1),
            "softmax, log": lambda: logits.softmax(dim=-1).log(),
            "none": lambda: logits,
            "time": lambda: logits.log_softmax(dim=1),
            "probability": lambda: logits.softmax(dim=-1),
        }[normalize]()
        token = sign * values.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        total = (token.where(is_target, 0.0) if mask else token).sum(dim=-1)
        counts = is_target.sum(dim=-1)
        if reduce == "mean":
            total = total / counts
        everything = torch.full_like(counts, targets.shape[1])
        return total, counts if count == "targets" else everything

    return sums


def _shifted_again(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    total, _ = response_log_probs(logits[:, :-1], targets[:, 1:])
    return total, (targets[:, 1:] != -100).sum(dim=-1)


def _sums_and_gradient(answer: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Any]:
    """Sums, counts and the gradient of a weighted sum, so that a detached answer is told from a right one."""
    logits, targets = case.args
    logits = logits.requires_grad_()
    total, counts = answer(logits, targets)
    weights = torch.arange(1.0, len(total) + 1)
    gradient: Tensor | str = "none: the sums are cut off from the gradient"
    if isinstance(total, Tensor) and total.requires_grad:
        (gradient,) = torch.autograd.grad((weights * total).sum(), logits)
        total = total.detach()
    return {"log_probs": total, "counts": counts, "gradient": gradient}


def _sums_detached(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return response_log_probs(logits.detach(), targets)


RESPONSE_LOG_PROBS = Exercise(
    id="response_log_probs",
    title="Log-probabilities of responses",
    points=2,
    reference=response_log_probs,
    cases=_logit_cases,
    run=_sums_and_gradient,
    mutants=[
        Mutant(
            "mean",
            _sums_with(reduce="mean"),
            "You seem to average over the tokens. ln pi(y|x) of a response is the sum over its tokens; return the "
            "counts beside it, so that losses per token can divide.",
        ),
        Mutant(
            "no mask",
            _sums_with(mask=False),
            "You seem to add up all positions. Where the target is -100 there is prompt or padding, whose "
            "log-probability is not the response's.",
        ),
        Mutant(
            "logits as they are",
            _sums_with(normalize="none"),
            "You seem to pick the targets' logits without normalizing them. A log-probability is a logit minus the "
            "logarithm of the sum of exponentials over the vocabulary.",
        ),
        Mutant(
            "softmax over time",
            _sums_with(normalize="time"),
            "You seem to normalize over the positions (dim=1). The probabilities of one position's tokens sum to 1, so "
            "the softmax goes over the last axis.",
        ),
        Mutant(
            "log of softmax",
            _sums_with(normalize="softmax, log"),
            "You seem to take the logarithm of a softmax. The probability of an unlikely token rounds to 0, whose "
            "logarithm is -inf: use `log_softmax`.",
        ),
        Mutant(
            "probabilities",
            _sums_with(normalize="probability"),
            "You seem to add up probabilities. The probability of a response is their product, so add up logarithms.",
        ),
        Mutant(
            "negative",
            _sums_with(sign=-1),
            "Your sums are positive: that is the negative log-likelihood. Log-probabilities are at most 0.",
        ),
        Mutant(
            "shifted again",
            _shifted_again,
            "You seem to shift the targets. They already stand at the position that predicts them.",
        ),
        Mutant(
            "counts of all positions",
            _sums_with(count="positions"),
            "Your counts are the length of the row. Count the targets that are not -100.",
        ),
        Mutant(
            "detached",
            _sums_detached,
            "Your sums are cut off from the graph (`.detach()`, `.item()` or `no_grad`), so the policy would not "
            "learn.",
        ),
    ],
    hints=(
        "`logits.log_softmax(-1)`, then `gather` at `targets.clamp(min=0)`, 0 where the target is -100, and sum over "
        "T.",
    ),
)


# --- DPO --------------------------------------------------------------------------------------------------------


def _pair_cases(**options: float) -> Callable[[int], list[Case]]:
    """Three batches of pairs; the last has margins that no exponential survives."""

    def cases(seed: int) -> list[Case]:
        far = _four(seed + 2, 2)
        far = (far[0] - torch.tensor([20 * FAR, 0.0]), far[1] - torch.tensor([0.0, 20 * FAR]), *far[2:])
        first = {name: value for name, value in options.items() if name == "beta"}
        found = [
            Case(_four(seed, 3), first, name="3 pairs"),
            Case(_four(seed + 1, 5), options, name="5 pairs"),
        ]
        return [*found, Case(far, options, name="two pairs with margins of thousands of nats")]

    return cases


def _dpo_with(
    *,
    sign: int = 1,
    reference: bool = True,
    scale: bool = True,
    stable: bool = True,
    smoothing: str = "cDPO",
    probabilities: bool = False,
    reduce: bool = False,
) -> Callable[..., Tensor]:
    def loss(
        chosen: Tensor,
        rejected: Tensor,
        chosen_ref: Tensor,
        rejected_ref: Tensor,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if not reference:
            chosen_ref = rejected_ref = torch.zeros_like(chosen)
        h = _log_ratios(chosen, rejected, chosen_ref, rejected_ref)
        if probabilities:
            h = (chosen - chosen_ref).exp() - (rejected - rejected_ref).exp()
        logit = sign * (beta if scale else 1.0) * h
        right, wrong = (-F.logsigmoid(z) if stable else -torch.sigmoid(z).log() for z in (logit, -logit))
        e = label_smoothing
        value = {
            "cDPO": lambda: (1 - e) * right + e * wrong,
            "none": lambda: right,
            "swapped": lambda: e * right + (1 - e) * wrong if e else right,
            "half": lambda: (1 - e / 2) * right + e / 2 * wrong,
            "robust": lambda: ((1 - e) * right - e * wrong) / (1 - 2 * e),
            "logit": lambda: -F.logsigmoid((1 - 2 * e) * logit),
        }[smoothing]()
        return value.mean() if reduce else value

    return loss


def _dpo_detached(*args: Tensor, **options: float) -> Tensor:
    return losses.dpo_loss(args[0], args[1].detach(), *args[2:], **options)


DPO_LOSS = Exercise(
    id="dpo_loss",
    title="DPO loss",
    points=3,
    reference=losses.dpo_loss,
    cases=_pair_cases(beta=0.3, label_smoothing=0.2),
    run=_with_policy_gradients(0, 1),
    mutants=[
        Mutant(
            "sides swapped",
            _dpo_with(sign=-1),
            "Your loss falls when the rejected response gains: h is the log-ratio of the chosen response minus that of "
            "the rejected one.",
        ),
        Mutant(
            "no reference",
            _dpo_with(reference=False),
            "You seem to leave out the reference. Without it, a response that was likely from the start counts as one "
            "that the policy has learned to prefer.",
        ),
        Mutant(
            "no beta",
            _dpo_with(scale=False),
            "You seem to leave out beta: the logit is beta h. It says how many nats of log-ratio make one unit of "
            "reward.",
        ),
        Mutant(
            "ratios of probabilities",
            _dpo_with(probabilities=True),
            "You seem to subtract ratios of probabilities. The implicit reward is the logarithm of the ratio.",
        ),
        Mutant(
            "log of sigmoid",
            _dpo_with(stable=False),
            "You seem to take the logarithm of a sigmoid, which rounds to 0 for a pair that is far on the wrong side: "
            "the loss is infinite and its gradient NaN. Use `F.logsigmoid`.",
        ),
        Mutant(
            "no smoothing",
            _dpo_with(smoothing="none"),
            "You seem to ignore `label_smoothing`: with probability e the label is wrong and -ln sigmoid(-beta h) "
            "counts.",
        ),
        Mutant(
            "smoothing swapped",
            _dpo_with(smoothing="swapped"),
            "Your two terms have each other's weights: the label as given is right with probability 1 - e.",
        ),
        Mutant(
            "half of the smoothing",
            _dpo_with(smoothing="half"),
            "You seem to spread e over both outcomes, as label smoothing of classes does. Here e is the probability "
            "that the label is wrong, and all of it goes to the other outcome.",
        ),
        Mutant(
            "robust DPO",
            _dpo_with(smoothing="robust"),
            "You seem to subtract the term of the wrong label and divide by 1 - 2e. That is robust DPO, an unbiased "
            "estimate of the loss without noise, and unbounded below. cDPO adds the two terms.",
        ),
        Mutant(
            "smoothed logit",
            _dpo_with(smoothing="logit"),
            "You seem to scale the logit by 1 - 2e. Smoothing weighs two losses; it does not change their logits.",
        ),
        Mutant(
            "mean",
            _dpo_with(reduce=True),
            "You seem to return the mean. Return one loss per pair, (B,): the loop sums and divides.",
        ),
        Mutant(
            "rejected side detached",
            _dpo_detached,
            "The rejected response has no gradient: its log-probability is detached. Pushing it down is half of DPO.",
        ),
    ],
    hints=(
        "h = (chosen - chosen_ref) - (rejected - rejected_ref); then -(1 - e) logsigmoid(beta h) and its mirror.",
    ),
)


# --- implicit rewards -------------------------------------------------------------------------------------------


def implicit_rewards(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_ref_log_probs: Tensor,
    rejected_ref_log_probs: Tensor,
    *,
    beta: float,
) -> dict[str, Tensor]:
    """Means over a batch of the implicit rewards beta (ln pi - ln pi_ref), by the package's `preference_metrics`.

    Args:
        chosen_log_probs, rejected_log_probs: (B,), under the policy.
        chosen_ref_log_probs, rejected_ref_log_probs: (B,), under the reference.
        beta: as in the loss.

    Returns:
        Scalars "chosen_reward", "rejected_reward", "margin" (their difference) and "accuracy": the share of pairs whose
        chosen response has the larger reward, a tie counting one half.
    """
    return losses.preference_metrics(
        beta * (chosen_log_probs - chosen_ref_log_probs), beta * (rejected_log_probs - rejected_ref_log_probs)
    )


def _reward_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    # Columns: right with both rewards negative and the chosen response less likely; a tie above 0; wrong with both
    # above 0; right; right with a negative reward of the rejected response.
    pairs = torch.tensor(
        [
            [-40.0, -25.0, -30.0, -20.0, -33.0],  # chosen
            [-30.0, -35.0, -25.0, -22.0, -28.0],  # rejected
            [-39.0, -27.0, -31.0, -23.0, -35.0],  # chosen under the reference
            [-26.0, -37.0, -28.0, -21.0, -21.0],  # rejected under the reference
        ]
    )
    pairs = torch.randint(1, 4, (), generator=g) * pairs + torch.randint(
        -9, 10, (5,), generator=g
    )  # keeps the tie
    policy = _four(seed, 4)[:2]
    return [
        Case(tuple(pairs), {"beta": 0.4}, name="5 pairs, one of them a tie"),
        Case((*policy, *policy), {"beta": 0.1}, name="policy = reference"),
    ]


def _rewards_with(
    *, reference: bool = True, scale: bool = True, ties: float = 0.5, by: str = "reward", sign: int = 1
) -> Callable[..., dict[str, Tensor]]:
    def rewards(
        chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float
    ) -> dict[str, Tensor]:
        factor = beta if scale else 1.0
        a = factor * (chosen - chosen_ref if reference else chosen)
        b = factor * (rejected - rejected_ref if reference else rejected)
        margin = sign * (a - b)
        judged = chosen - rejected if by == "log-probability" else a if by == "sign of chosen" else a - b
        accuracy = (judged > 0).float() + ties * (judged == 0).float()
        return {
            "chosen_reward": a.mean(),
            "rejected_reward": b.mean(),
            "margin": margin.mean(),
            "accuracy": accuracy.mean(),
        }

    return rewards


IMPLICIT_REWARDS = Exercise(
    id="implicit_rewards",
    title="Implicit rewards",
    points=1,
    reference=implicit_rewards,
    cases=_reward_cases,
    mutants=[
        Mutant(
            "no reference",
            _rewards_with(reference=False),
            "You seem to leave out the reference: the implicit reward is beta times the log-ratio to it.",
        ),
        Mutant(
            "no beta",
            _rewards_with(scale=False),
            "Your rewards are log-ratios: beta is missing, and margins of runs with different betas cannot be "
            "compared.",
        ),
        Mutant(
            "accuracy of log-probabilities",
            _rewards_with(by="log-probability"),
            "Your accuracy compares log-probabilities under the policy. Which response is likelier is another question "
            "(and often answered wrongly after DPO); compare rewards.",
        ),
        Mutant(
            "positive rewards",
            _rewards_with(by="sign of chosen"),
            "Your accuracy counts chosen responses with a positive reward. A pair is right when its chosen response "
            "has the larger one, even if both are negative.",
        ),
        Mutant(
            "ties count nothing",
            _rewards_with(ties=0.0),
            "Ties seem to count nothing, as in TRL. Before the first step all pairs are ties, and a policy that knows "
            "nothing should have an accuracy of one half.",
        ),
        Mutant(
            "ties count as right",
            _rewards_with(ties=1.0),
            "Ties seem to count as right (>=): a policy that equals its reference would be perfect. Count one half.",
        ),
        Mutant(
            "margin turned around",
            _rewards_with(sign=-1),
            "Your margin is the rejected reward minus the chosen one.",
        ),
    ],
    hints=("reward = beta (ln pi - ln pi_ref) for each side; `preference_metrics` shows what is averaged.",),
)


# --- IPO --------------------------------------------------------------------------------------------------------


def _ipo_cases(seed: int) -> list[Case]:
    chosen, *others = _four(seed + 1, 5)
    chosen = chosen + torch.tensor([20.0, 0.0, 0.0, 0.0, 0.0])  # a margin beyond the target
    return [
        Case(_four(seed, 3), {"beta": 0.1}, name="3 pairs"),
        Case((chosen, *others), {"beta": 0.4}, name="5 pairs"),
    ]


def _ipo_with(form: Callable[[Tensor, float], Tensor], *, reference: bool = True) -> Callable[..., Tensor]:
    def loss(
        chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
    ) -> Tensor:
        if not reference:
            chosen_ref = rejected_ref = torch.zeros_like(chosen)
        return form(_log_ratios(chosen, rejected, chosen_ref, rejected_ref), beta)

    return loss


def _ipo_detached(*args: Tensor, beta: float = 0.1) -> Tensor:
    return losses.ipo_loss(args[0], args[1].detach(), *args[2:], beta=beta)


IPO_LOSS = Exercise(
    id="ipo_loss",
    title="IPO loss",
    points=1,
    reference=losses.ipo_loss,
    cases=_ipo_cases,
    run=_with_policy_gradients(0, 1),
    mutants=[
        Mutant(
            "target 1 / beta",
            _ipo_with(lambda h, beta: (h - 1 / beta).square()),
            "Your target is 1 / beta. The two orders of a pair share it: the target of h is 1 / (2 beta).",
        ),
        Mutant(
            "target beta / 2",
            _ipo_with(lambda h, beta: (h - beta / 2).square()),
            "Your target grows with beta. A strong pull to the reference (a large beta) leaves a small margin, "
            "1 / (2 beta).",
        ),
        Mutant(
            "scaled by beta",
            _ipo_with(lambda h, beta: (beta * h - 0.5).square()),
            "You seem to compare beta h with 1/2. Minimum and idea are right, but the loss is smaller by beta squared, "
            "and with it the gradient; eq. 17 compares h with 1 / (2 beta).",
        ),
        Mutant(
            "no reference",
            _ipo_with(lambda h, beta: (h - 1 / (2 * beta)).square(), reference=False),
            "You seem to leave out the reference: h is a difference of log-ratios, not of log-probabilities.",
        ),
        Mutant(
            "sign of the target",
            _ipo_with(lambda h, beta: (h + 1 / (2 * beta)).square()),
            "You seem to pull h to -1 / (2 beta), which favors the rejected response.",
        ),
        Mutant(
            "hinge",
            _ipo_with(lambda h, beta: (1 / (2 * beta) - h).clamp(min=0).square()),
            "You seem to leave pairs alone that are beyond the target. IPO pulls them back, which is what keeps the "
            "policy near the reference.",
        ),
        Mutant(
            "rejected side detached",
            _ipo_detached,
            "The rejected response has no gradient: its log-probability is detached.",
        ),
    ],
    hints=("The square of the distance between h and 1 / (2 beta), for each pair.",),
)


# --- KTO --------------------------------------------------------------------------------------------------------


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    mismatched_log_probs: Tensor,
    mismatched_ref_log_probs: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's loss of single responses with its reference point, by the package's functions of these names.

    Args:
        log_probs, ref_log_probs: (B,), of the responses.
        desirable: (B,) bool, which of them are wanted.
        mismatched_log_probs, mismatched_ref_log_probs: (M,), of responses that belong to other prompts.
        beta: scale of the log-ratios.
        desirable_weight, undesirable_weight: weights of the two kinds.

    Returns:
        Losses (B,). The reference point has no gradient.
    """
    return losses.kto_loss(
        log_probs,
        ref_log_probs,
        desirable,
        losses.kto_reference_point(mismatched_log_probs, mismatched_ref_log_probs),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def _kto_cases(seed: int) -> list[Case]:
    cases = []
    for b, m, shift, options in (
        (5, 3, 4.0, {"beta": 0.3}),
        (4, 6, -9.0, {"beta": 0.2, "desirable_weight": 1.5}),
        (7, 2, 6.0, {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}),
    ):
        g = _generator(seed)
        ref, ratios = -30 + 5 * torch.randn(b, generator=g), 5 * torch.randn(b, generator=g)
        log_probs = (
            ref + ratios - ratios.mean() + 2.5
        )  # their own mean log-ratio is another than the mismatched one
        desirable = torch.arange(b) % 3 != 1
        mismatched_ref = -40 + torch.randn(m, generator=g)
        mismatched = mismatched_ref + shift + torch.randn(m, generator=g)
        what = "positive" if shift > 0 else "negative"
        cases.append(
            Case(
                (log_probs, ref, desirable, mismatched, mismatched_ref),
                options,
                name=f"a {what} mean log-ratio",
            )
        )
    return cases


def _kto_with(
    *, point: str = "right", form: str = "1 - sigmoid", mirror: bool = True, weights: str = "right"
) -> Callable[..., Tensor]:
    def loss(
        log_probs: Tensor,
        ref_log_probs: Tensor,
        desirable: Tensor,
        mismatched_log_probs: Tensor,
        mismatched_ref_log_probs: Tensor,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> Tensor:
        mean = (mismatched_log_probs - mismatched_ref_log_probs).mean()
        z = {
            "right": lambda: mean.detach().clamp(min=0),
            "with gradient": lambda: mean.clamp(min=0),
            "not clamped": lambda: mean.detach(),
            "absolute": lambda: mean.detach().abs(),
            "none": lambda: torch.zeros(()),
            "own": lambda: (log_probs - ref_log_probs).detach().mean().clamp(min=0),
        }[point]()
        away = log_probs - ref_log_probs - z
        gained = beta * torch.where(desirable, away, -away) if mirror else beta * away
        value = 1 - torch.sigmoid(gained) if form == "1 - sigmoid" else -F.logsigmoid(gained)
        pair = (desirable_weight, undesirable_weight)
        first, second = pair if weights == "right" else pair[::-1] if weights == "swapped" else (1.0, 1.0)
        return torch.where(desirable, first, second) * value

    return loss


KTO_LOSS = Exercise(
    id="kto_loss",
    title="KTO loss",
    points=2,
    reference=kto_loss,
    cases=_kto_cases,
    run=_with_policy_gradients(0, 3),
    mutants=[
        Mutant(
            "gradient through the reference point",
            _kto_with(point="with gradient"),
            "Gradients flow through your reference point. It only says where the loss saturates: detach it, or the "
            "policy is trained on responses to other prompts.",
        ),
        Mutant(
            "reference point not clamped",
            _kto_with(point="not clamped"),
            "Your reference point is negative in one case. It estimates a KL divergence, which is not: clamp it at 0.",
        ),
        Mutant(
            "absolute value",
            _kto_with(point="absolute"),
            "You seem to take the absolute value of the mean. An estimate of a KL divergence below 0 counts as 0.",
        ),
        Mutant(
            "no reference point",
            _kto_with(point="none"),
            "You seem to leave out the reference point: KTO compares a log-ratio with z, not with 0.",
        ),
        Mutant(
            "reference point of the own responses",
            _kto_with(point="own"),
            "Your reference point is the mean log-ratio of the responses that are judged. It is that of mismatched "
            "ones, whose labels say nothing about it.",
        ),
        Mutant(
            "same sign for both",
            _kto_with(mirror=False),
            "Undesirable responses are rewarded for gaining: their argument is z minus the log-ratio.",
        ),
        Mutant(
            "logistic loss",
            _kto_with(form="logistic"),
            "You seem to minimize -ln sigmoid, as DPO does. KTO minimizes 1 - sigmoid, whose gradient vanishes on both "
            "sides, so that a hopeless example is given up.",
        ),
        Mutant(
            "weights swapped",
            _kto_with(weights="swapped"),
            "The two weights are swapped: `desirable_weight` belongs to the responses that are wanted.",
        ),
        Mutant(
            "no weights",
            _kto_with(weights="none"),
            "You seem to ignore the weights of desirable and undesirable responses.",
        ),
    ],
    hints=(
        "z = mean of the mismatched log-ratios, clamped at 0, without gradient; then w (1 - sigmoid(+-beta (ratio - "
        "z))).",
    ),
)


# --- SimPO ------------------------------------------------------------------------------------------------------


def simpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """SimPO's loss (B,) from summed log-probabilities (B,) and lengths (B,) int64, by the package's `simpo_loss`."""
    return losses.simpo_loss(
        chosen_log_probs / chosen_lengths, rejected_log_probs / rejected_lengths, beta=beta, gamma=gamma
    )


def _simpo_cases(seed: int) -> list[Case]:
    cases = []
    for b, options in ((3, {"beta": 2.5, "gamma": 0.8}), (5, {"beta": 4.0, "gamma": 0.5})):
        g = _generator(seed)
        lengths = [torch.randint(3 + 6 * i, 9 + 6 * i, (b,), generator=g) for i in range(2)]
        sums = [-lengths[i] * (0.3 + torch.rand(b, generator=g)) for i in range(2)]
        cases.append(Case((*sums, *lengths), options, name=f"{b} pairs of unequal lengths"))
    return cases


def _simpo_with(logit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        chosen: Tensor, rejected: Tensor, n: Tensor, m: Tensor, *, beta: float = 2.0, gamma: float = 1.0
    ) -> Tensor:
        return -F.logsigmoid(logit(chosen, rejected, n, m, beta, gamma))

    return loss


SIMPO_LOSS = Exercise(
    id="simpo_loss",
    title="SimPO loss",
    points=1,
    reference=simpo_loss,
    cases=_simpo_cases,
    run=_with_policy_gradients(0, 1),
    mutants=[
        Mutant(
            "sums",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (c - r) - gamma),
            "You seem to compare sums. SimPO's reward is the mean log-probability per token, so divide by the lengths.",
        ),
        Mutant(
            "one length for both",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (c - r) / n - gamma),
            "You seem to divide both sums by the chosen response's length. Each has its own.",
        ),
        Mutant(
            "sign of the margin",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (c / n - r / m) + gamma),
            "You add gamma: pairs would count as won before they are. The chosen response must win by gamma, so "
            "subtract.",
        ),
        Mutant(
            "margin times beta",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (c / n - r / m - gamma)),
            "You multiply gamma by beta. Gamma is a margin of rewards and beta is already in them (the authors' code "
            "asks for gamma / beta, which is where the two forms get mixed up).",
        ),
        Mutant(
            "no margin",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (c / n - r / m)),
            "You seem to leave out gamma.",
        ),
        Mutant(
            "no beta",
            _simpo_with(lambda c, r, n, m, beta, gamma: c / n - r / m - gamma),
            "You seem to leave out beta, which scales the means.",
        ),
        Mutant(
            "sides swapped",
            _simpo_with(lambda c, r, n, m, beta, gamma: beta * (r / m - c / n) - gamma),
            "Your loss falls when the rejected response gains: subtract its mean from the chosen one's.",
        ),
    ],
    hints=("beta times the difference of the two means, minus gamma, through -logsigmoid.",),
)


# --- the weight of a pair in DPO's gradient ---------------------------------------------------------------------


def dpo_gradient_weight(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_ref_log_probs: Tensor,
    rejected_ref_log_probs: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """w (B,) in grad loss = -w (grad ln pi(chosen) - grad ln pi(rejected)): w = beta sigmoid(-beta h), from
    `log_ratio_margin` (Rafailov et al., 2023, section 4). All log-probabilities (B,); w is positive."""
    h = losses.log_ratio_margin(
        chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs
    )
    return beta * torch.sigmoid(-beta * h)


def _weight_with(form: Callable[[Tensor, float], Tensor], *, reference: bool = True) -> Callable[..., Tensor]:
    return _ipo_with(form, reference=reference)


DPO_GRADIENT_WEIGHT = Exercise(
    id="dpo_gradient_weight",
    title="Weight of a pair in DPO's gradient",
    points=2,
    reference=dpo_gradient_weight,
    cases=lambda seed: [
        Case(_four(seed, 3), {"beta": 0.1}, name="3 pairs"),
        Case(_four(seed + 1, 6), {"beta": 0.5}, name="6 pairs"),
    ],
    mutants=[
        Mutant(
            "weight of the right ones",
            _weight_with(lambda h, beta: beta * torch.sigmoid(beta * h)),
            "Your weight grows with the margin: pairs that are already right would move the policy most. It is "
            "sigmoid(-beta h), the probability that the implicit reward gives to the wrong order.",
        ),
        Mutant(
            "no factor beta",
            _weight_with(lambda h, beta: torch.sigmoid(-beta * h)),
            "The factor beta is missing: the chain rule brings it out of the logit beta h.",
        ),
        Mutant(
            "beta outside only",
            _weight_with(lambda h, beta: beta * torch.sigmoid(-h)),
            "Beta is missing inside the sigmoid: its argument is the margin of rewards, -beta h.",
        ),
        Mutant(
            "derivative of the sigmoid",
            _weight_with(lambda h, beta: beta * torch.sigmoid(beta * h) * torch.sigmoid(-beta * h)),
            "You seem to have differentiated the sigmoid without the logarithm: (ln sigmoid)'(z) = sigmoid(-z). With "
            "that extra factor pairs that are far wrong would have no weight; it is KTO's kind of gradient.",
        ),
        Mutant(
            "sign of the derivative",
            _weight_with(lambda h, beta: -beta * torch.sigmoid(-beta * h)),
            "You give the derivative of the loss by h, which is negative. Asked for is the positive weight in front of "
            "the gradients' difference.",
        ),
        Mutant(
            "no reference",
            _weight_with(lambda h, beta: beta * torch.sigmoid(-beta * h), reference=False),
            "You seem to leave out the reference: a pair is wrong when its log-ratios are in the wrong order, whatever "
            "its log-probabilities are.",
        ),
    ],
    hints=("Differentiate -ln sigmoid(beta h) by h, and turn the sign around.",),
)

EXERCISES = [
    RESPONSE_LOG_PROBS,
    DPO_LOSS,
    DPO_GRADIENT_WEIGHT,
    IMPLICIT_REWARDS,
    IPO_LOSS,
    KTO_LOSS,
    SIMPO_LOSS,
]
