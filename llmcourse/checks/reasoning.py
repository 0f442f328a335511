"""Exercises of chapter 15, reasoning: a verifier, group advantages, the clipped surrogate, KL estimates, votes.

Shapes: B responses, T positions; groups of responses to one prompt stand side by side.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcourse.alignment import policy_losses, rewards
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.inference import test_time


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_gradient(answer: Callable[..., Tensor], case: Case) -> dict[str, Any]:
    """The answer's tensor and d(weighted sum of it) / d(first argument): what a detached answer gets wrong.

    Only the first argument needs a gradient, so that detaching advantages or reference log-probs, as a trainer does,
    is no mistake.
    """
    leaf = case.args[0].detach().requires_grad_()
    value = answer(leaf, *case.args[1:], **case.kwargs)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {"value": value, "gradient": "none: the result is cut off from the gradient"}
    weights = torch.linspace(0.5, 1.5, value.numel()).view_as(value)
    (gradient,) = torch.autograd.grad((weights * value).sum(), leaf, allow_unused=True)
    return {"value": value.detach(), "gradient": "unused" if gradient is None else gradient}


# --- a verifier -------------------------------------------------------------------------------------------------


def _answer_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    a, b = numbers.randrange(31, 59), numbers.randrange(11, 30)
    total = a + b
    worked = f"{a} + {b}: {a % 10}+{b % 10}={a % 10 + b % 10}, {total}"
    texts = [
        (worked, total),
        (f"{worked}.", total),
        (f"It is {total}.\n", total),
        (f"{total}", total),
        (worked, total + 1),
        (worked, a),  # one of the operands
        (f"1{total}", total),
        (f"{b} - {total} = -{a}", a),
        (f"{b} - {total} = -{a}.", -a),
        (f"{total} and more", total),
        (f"{total}, or is it {a}?", total),
        ("I do not know.", total),
        ("", total),
    ]
    return [Case(pair, name=f"text={pair[0]!r}, answer={pair[1]}") for pair in texts]


def _score(answer: Callable[[str, int], Any], case: Case) -> Any:
    """A reward as a float; True and 1 are as good as 1.0."""
    value = answer(*case.args)
    return float(value) if isinstance(value, (bool, int, float)) else value


def _signless(text: str, answer: int) -> float:
    match = re.search(r"[0-9]+(?=\.?\s*$)", text)
    return float(match is not None and match.group() == str(abs(answer)))


def _last_number(text: str, answer: int) -> float:
    found = re.findall(r"-?[0-9]+", text)
    return float(bool(found) and int(found[-1]) == answer)


def _strict_end(text: str, answer: int) -> float:
    match = re.search(r"(?<![0-9])-?[0-9]+$", text)
    return float(match is not None and match.group() == str(answer))


RIGHT_ANSWER = Exercise(
    id="right_answer",
    title="Verifier of sums",
    points=2,
    reference=rewards.right_answer,
    cases=_answer_cases,
    run=_score,
    mutants=[
        Mutant(
            "anywhere",
            rewards.mentions_answer,
            "You seem to accept the answer anywhere in the text. A policy that lists numbers would earn the reward: "
            "only the number at the end counts.",
        ),
        Mutant(
            "last number",
            _last_number,
            "You seem to take the last number of the text, whatever follows it. A text that goes on after its number "
            "has not ended with an answer: allow a full stop and white space after it, nothing else.",
        ),
        Mutant(
            "suffix",
            lambda text, answer: float(text.strip().removesuffix(".").endswith(str(answer))),
            "You seem to compare the last characters. 185 ends with the characters of 85 and is another number: take "
            "the whole number, sign included, and compare it.",
        ),
        Mutant(
            "sign lost",
            _signless,
            "You seem to lose the sign: -7 is not 7. A minus directly before the digits belongs to the number.",
        ),
        Mutant(
            "no full stop",
            _strict_end,
            "You seem to reject a right answer because of the full stop or the line break behind it. A verifier that "
            "is too strict teaches punctuation.",
        ),
        Mutant(
            "nothing but the answer",
            lambda text, answer: float(text.strip().removesuffix(".") == str(answer)),
            "You seem to want the answer alone. The steps before it are what the model shall be free to write.",
        ),
    ],
    hints=(
        "Search for an optional minus and digits that stand at the end, before an optional full stop and white space, "
        "and that no other digit precedes: re.search(r'(?<![0-9])-?[0-9]+(?=\\.?\\s*$)', text).",
    ),
)


# --- advantages -------------------------------------------------------------------------------------------------


def _reward_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    spread = 3 * torch.rand(12, generator=g)
    # whole numbers, so that the mean of the equal group is exact however it is computed
    binary = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    fine = 5 + torch.rand(15, generator=g)
    return [
        Case((spread, 4), name="3 groups of 4"),
        Case((binary, 5), name="2 groups of 5, all rewards of the second 1"),
        Case((fine, 3), {"scale": "none"}, name='5 groups of 3, scale="none"'),
    ]


def _advantages_with(
    *,
    layout: str = "side by side",
    center: str = "group",
    spread: str = "sample",
    epsilon: float = 1e-4,
    sign: float = 1.0,
    obeys_scale: bool = True,
) -> Callable[..., Tensor]:
    def advantages(rewards: Tensor, group_size: int, *, scale: str = "group") -> Tensor:
        grouped = rewards.view(-1, group_size) if layout == "side by side" else rewards.view(group_size, -1).T
        mean = grouped.mean() if center == "batch" else grouped.mean(dim=1, keepdim=True)
        if center == "others":
            mean = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
        centered = sign * (grouped - mean)
        if scale == "group" or not obeys_scale:
            deviation = grouped.std(dim=1, keepdim=True, correction=0 if spread == "population" else 1)
            deviation = deviation.square() if spread == "variance" else deviation
            deviation = grouped.std() if spread == "batch" else deviation
            centered = centered / (deviation + epsilon)
        return (centered if layout == "side by side" else centered.T).flatten()

    return advantages


GROUP_ADVANTAGES = Exercise(
    id="group_advantages",
    title="Group advantages",
    points=2,
    reference=policy_losses.group_advantages,
    cases=_reward_cases,
    rtol=1e-4,
    mutants=[
        Mutant(
            "mean of the batch",
            _advantages_with(center="batch"),
            "You seem to subtract the mean of all rewards. The baseline is the mean of the responses to the same "
            "prompt: with one mean for all, every response to an easy prompt looks good.",
        ),
        Mutant(
            "interleaved groups",
            _advantages_with(layout="interleaved"),
            "You seem to compare responses to different prompts. The responses of a group stand side by side: "
            "rewards.view(-1, group_size) has one group a row.",
        ),
        Mutant(
            "leave one out",
            _advantages_with(center="others"),
            "You seem to subtract the mean of the other responses. That is RLOO's baseline, N / (N - 1) times as far "
            "off; GRPO's mean includes the response itself.",
        ),
        Mutant(
            "population deviation",
            _advantages_with(spread="population"),
            "You seem to divide by the population's standard deviation. Asked for is the sample's, with N - 1, which "
            "torch's std gives by default.",
        ),
        Mutant(
            "variance",
            _advantages_with(spread="variance"),
            "You seem to divide by the variance. The standard deviation is its root, and makes the advantage free of "
            "the reward's unit.",
        ),
        Mutant(
            "deviation of the batch",
            _advantages_with(spread="batch"),
            "You seem to divide by the standard deviation of all rewards. Here each group is divided by its own.",
        ),
        Mutant(
            "no epsilon",
            _advantages_with(epsilon=0.0),
            "A group of equal rewards gives you NaN: its deviation is 0. Add 1e-4 to the deviation, and the advantages "
            "of such a group are 0.",
        ),
        Mutant(
            "sign",
            _advantages_with(sign=-1.0),
            "Your sign is turned: a reward above the mean of its group has a positive advantage.",
        ),
        Mutant(
            "always divided",
            _advantages_with(obeys_scale=False),
            'You seem to divide by the deviation for scale="none" too. Dr. GRPO only subtracts the mean.',
        ),
    ],
    hints=(
        "grouped = rewards.view(-1, group_size); mean and std over dim=1 with keepdim=True; flatten at the end.",
    ),
)


# --- the clipped surrogate --------------------------------------------------------------------------------------


def _surrogate_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    # ratios far out on both sides, so that every clip acts under either sign of the advantage
    near = torch.tensor([-0.6, -0.1, 0.1, 0.35, 0.7])
    log_ratio = near.repeat(4, 1) + 0.05 * torch.randn(4, 5, generator=g)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    advantages = signs * (0.5 + torch.rand(4, 1, generator=g))
    per_token = torch.randn(3, 7, generator=g)
    sequence = torch.tensor([[-0.4], [0.45], [0.3], [-0.3], [0.01], [0.6]])
    weights = torch.tensor([[1.0], [1.3], [-0.7], [-1.1], [0.4], [-0.2]])
    return [
        Case(
            (log_ratio, advantages),
            {"clip_low": 0.2, "clip_high": 0.28},
            name="a response's advantage, (4, 1)",
        ),
        Case(
            (0.6 * torch.randn(3, 7, generator=g), per_token),
            {"clip_low": 0.3, "clip_high": 0.1},
            name="an advantage for each token, (3, 7)",
        ),
        Case(
            (sequence, weights), {"clip_low": 0.2, "clip_high": 0.2}, name="a ratio for each sequence, (6, 1)"
        ),
    ]


def _surrogate_with(
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda ratio, clipped, a: torch.minimum(
        ratio * a, clipped * a
    ),
    *,
    sign: float = -1.0,
    bounds: Callable[[float, float], tuple[float, float]] = lambda low, high: (low, high),
    log_space: bool = False,
    ratio_of: Callable[[Tensor], Tensor] = torch.exp,
) -> Callable[..., Tensor]:
    def surrogate(
        log_ratio: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
    ) -> Tensor:
        low, high = bounds(clip_low, clip_high)
        ratio = ratio_of(log_ratio)
        clipped = log_ratio.clamp(-low, high).exp() if log_space else ratio.clamp(1 - low, 1 + high)
        return sign * product(ratio, clipped, advantages)

    return surrogate


CLIPPED_SURROGATE = Exercise(
    id="clipped_surrogate",
    title="Clipped surrogate",
    points=2,
    reference=policy_losses.clipped_surrogate,
    cases=_surrogate_cases,
    run=_with_gradient,
    rtol=1e-4,
    mutants=[
        Mutant(
            "sign",
            _surrogate_with(sign=1.0),
            "You return what is to be maximized. A loss is minimized: turn the sign.",
        ),
        Mutant(
            "not clipped",
            _surrogate_with(lambda ratio, clipped, a: ratio * a),
            "You seem to leave the clip out: nothing keeps the policy near the one that wrote the responses.",
        ),
        Mutant(
            "clipped product only",
            _surrogate_with(lambda ratio, clipped, a: clipped * a),
            "You seem to use the clipped ratio alone. A token that has gone the wrong way then has no gradient and "
            "stays there. The minimum with the unclipped product gives it back.",
        ),
        Mutant(
            "maximum",
            _surrogate_with(lambda ratio, clipped, a: torch.maximum(ratio * a, clipped * a)),
            "You seem to take the larger product. The smaller one is the pessimistic bound: it limits what can be "
            "gained, never what can be lost.",
        ),
        Mutant(
            "minimum of the ratios",
            _surrogate_with(lambda ratio, clipped, a: torch.minimum(ratio, clipped) * a),
            "You seem to take the minimum of the ratios and multiply afterwards. Where the advantage is negative that "
            "is the larger product: multiply first.",
        ),
        Mutant(
            "one bound for both sides",
            _surrogate_with(bounds=lambda low, high: (low, low)),
            "You seem to clip at 1 + clip_low. The two sides have a bound each (DAPO's clip-higher).",
        ),
        Mutant(
            "bounds exchanged",
            _surrogate_with(bounds=lambda low, high: (high, low)),
            "Your bounds are exchanged: the ratio is clipped to 1 - clip_low below and to 1 + clip_high above.",
        ),
        Mutant(
            "clipped logarithm",
            _surrogate_with(log_space=True),
            "You seem to clip the logarithm of the ratio. The bounds are those of the ratio, which exp(0.2) = 1.22 "
            "exceeds.",
        ),
        Mutant(
            "logarithm for the ratio",
            _surrogate_with(ratio_of=lambda log_ratio: log_ratio),
            "You seem to use the logarithm as the ratio. The ratio is its exponential.",
        ),
        Mutant(
            "detached ratio",
            _surrogate_with(ratio_of=lambda log_ratio: log_ratio.detach().exp()),
            "Your value is right and has no gradient: the ratio must stay attached, since the policy is trained "
            "through it.",
        ),
    ],
    hints=(
        "ratio = exp(log_ratio), clipped = ratio.clamp(1 - clip_low, 1 + clip_high), and minus the elementwise minimum "
        "of the two products with the advantages.",
    ),
)


# --- estimates of the KL divergence -----------------------------------------------------------------------------


def _kl_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    cases = []
    for name, shape in (("k1", (2, 3)), ("k2", (4, 5)), ("k3", (3, 7))):
        log_probs = -0.2 - 2 * torch.rand(shape, generator=g)
        cases.append(Case((log_probs, log_probs + torch.randn(shape, generator=g), name), name=name))
    return cases


def _kl_with(
    *,
    direction: float = 1.0,
    k1: Callable[[Tensor], Tensor] = lambda d: d,
    k2: Callable[[Tensor], Tensor] = lambda d: d.square() / 2,
    k3: Callable[[Tensor], Tensor] = lambda d: torch.exp(-d) - 1 + d,
    weighted: bool = False,
) -> Callable[..., Tensor]:
    def estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k3") -> Tensor:
        d = direction * (log_probs - ref_log_probs)
        value = {"k1": k1, "k2": k2, "k3": k3}[estimator](d)
        return log_probs.exp() * value if weighted else value

    return estimate


KL_K3 = Exercise(
    id="kl_k3",
    title="Estimates of the KL divergence",
    points=2,
    reference=policy_losses.kl_estimate,
    cases=_kl_cases,
    run=_with_gradient,
    rtol=1e-4,
    mutants=[
        Mutant(
            "direction",
            _kl_with(direction=-1.0),
            "You seem to subtract the policy's log-probs from the reference's. The tokens are the policy's, so d is "
            "its log-prob minus that of the reference.",
        ),
        Mutant(
            "k3 of the inverse ratio",
            _kl_with(k3=lambda d: torch.exp(d) - 1 - d),
            "Your k3 takes the ratio of the policy to the reference. On the policy's own tokens the ratio's mean is 1 "
            "only the other way round: exp(-d), reference over policy.",
        ),
        Mutant(
            "k3 without the 1",
            _kl_with(k3=lambda d: torch.exp(-d) + d),
            "Your k3 misses the -1: where both policies agree, the estimate is 0.",
        ),
        Mutant(
            "k3 with minus d",
            _kl_with(k3=lambda d: torch.exp(-d) - 1 - d),
            "Your k3 subtracts d. With exp(-d) - 1 + d the slope at d = 0 vanishes, and the estimate is never "
            "negative.",
        ),
        Mutant(
            "k2 without the half",
            _kl_with(k2=torch.square),
            "Your k2 is twice too large: it is d^2 / 2, whose gradient is d times that of the log-prob.",
        ),
        Mutant(
            "absolute k1",
            _kl_with(k1=torch.abs),
            "Your k1 takes the absolute value. A single k1 may be negative; its mean is the divergence only with its "
            "signs.",
        ),
        Mutant(
            "always k3",
            _kl_with(k1=lambda d: torch.exp(-d) - 1 + d, k2=lambda d: torch.exp(-d) - 1 + d),
            "You seem to return k3 whatever estimator is asked for.",
        ),
        Mutant(
            "detached ratio",
            _kl_with(k3=lambda d: torch.exp(-d).detach() - 1 + d),
            "The value of your k3 is right and its gradient is not: the ratio is detached, and what is left is the "
            "gradient of k1, whose mean is 0.",
        ),
        Mutant(
            "weighted by the probability",
            _kl_with(weighted=True),
            "You seem to weigh by the policy's probability. The tokens were drawn from the policy: likely ones come "
            "often enough already.",
        ),
    ],
    hints=("d = log_probs - ref_log_probs; k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, all elementwise.",),
)


# --- averages ---------------------------------------------------------------------------------------------------


def aggregate(values: Tensor, mask: Tensor, average: str, max_length: int) -> Tensor:
    """Mean of the values where `mask` is 1, a scalar.

    Args:
        values: (B, T) one number for each token of each response; outside the mask anything, infinity included.
        mask: (B, T) of 0 and 1.
        average: "token" divides the sum by the number of tokens; "sequence" takes each response's mean, then the mean
            of the responses that have tokens; "constant" divides the sum by B times `max_length`.
        max_length: for "constant".
    """
    total, count = policy_losses.sum_and_count(values, mask, average, max_length)
    return total / count


def _average_cases(seed: int) -> list[Case]:
    g = _generator(seed)

    def build(lengths: Sequence[int], width: int, average: str, outside: float, name: str) -> Case:
        mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).float()
        values = 1 + torch.randn(len(lengths), width, generator=g)
        return Case(
            (values.masked_fill(mask == 0, outside), mask, average, 11), name=f'average="{average}", {name}'
        )

    return [
        build((7, 1, 4), 7, "token", 50.0, "lengths 7, 1, 4"),
        build((2, 6, 3, 5), 6, "sequence", 50.0, "lengths 2, 6, 3, 5"),
        build((5, 1), 5, "constant", 50.0, "lengths 5, 1"),
        build((3, 0, 8), 8, "sequence", 50.0, "lengths 3, 0, 8"),
        build((4, 9), 9, "token", -math.inf, "infinity outside the mask"),
    ]


def _aggregate_with(
    *,
    hide: str = "where",
    always: str = "",
    count_empty: bool = False,
    constant: str = "B max_length",
    token: str = "tokens",
    row: str = "length",
    detach: bool = False,
) -> Callable[..., Tensor]:
    def mean(values: Tensor, mask: Tensor, average: str, max_length: int) -> Tensor:
        rows, width = values.shape
        average = always or average
        kept = {
            "where": torch.where(mask.bool(), values, 0.0),
            "multiply": values * mask,
            "keep": values,
        }[hide]
        kept = kept.detach() if detach else kept
        lengths = mask.sum(dim=1).clamp(min=1) if row == "length" else torch.full((rows,), float(width))
        if average == "sequence":
            used = rows if count_empty else (mask.sum(dim=1) > 0).sum()
            return (kept.sum(dim=1) / lengths).sum() / used
        if average == "token":
            divisor = {"tokens": mask.sum(), "rows": rows, "positions": mask.numel()}[token]
            return kept.sum() / divisor
        divisor = {"B max_length": rows * max_length, "max_length": max_length, "B T": rows * width}[constant]
        return kept.sum() / divisor

    return mean


AGGREGATE = Exercise(
    id="aggregate",
    title="Average over tokens and responses",
    points=2,
    reference=aggregate,
    cases=_average_cases,
    run=_with_gradient,
    rtol=1e-4,
    mutants=[
        Mutant(
            "padding counted",
            _aggregate_with(hide="keep"),
            "You seem to sum over the padding as well. Only positions where the mask is 1 count.",
        ),
        Mutant(
            "zero times infinity",
            _aggregate_with(hide="multiply"),
            "Your result is not finite: 0 times infinity is no number. Replace what is outside the mask instead of "
            "multiplying it away: torch.where(mask.bool(), values, 0).",
        ),
        Mutant(
            "always the token mean",
            _aggregate_with(always="token"),
            'You seem to return the mean over tokens whatever is asked for. "sequence" gives each response the same '
            "weight, however long it is.",
        ),
        Mutant(
            "always the sequence mean",
            _aggregate_with(always="sequence"),
            'You seem to return the mean of the responses\' means whatever is asked for. "token" gives each token the '
            "same weight, so that a long response counts more.",
        ),
        Mutant(
            "positions for tokens",
            _aggregate_with(token="positions"),
            'For "token" you seem to divide by all positions. Divide by the sum of the mask.',
        ),
        Mutant(
            "rows for tokens",
            _aggregate_with(token="rows"),
            'For "token" you seem to divide by the number of responses: the loss then grows with their length.',
        ),
        Mutant(
            "rows divided by the width",
            _aggregate_with(row="width"),
            'For "sequence" you seem to divide each row by the width of the batch. Divide it by its own number of '
            "tokens; the width is that of the longest response.",
        ),
        Mutant(
            "empty responses counted",
            _aggregate_with(count_empty=True),
            'For "sequence" you seem to count responses without a token. One whose tokens were all dropped has no '
            "mean, and must not pull the others' down.",
        ),
        Mutant(
            "longest response as the constant",
            _aggregate_with(constant="B T"),
            'For "constant" you seem to divide by the width of this batch, which changes from batch to batch. The '
            "constant is max_length.",
        ),
        Mutant(
            "constant without the rows",
            _aggregate_with(constant="max_length"),
            'For "constant" you seem to forget the number of responses: divide by B * max_length.',
        ),
        Mutant(
            "detached",
            _aggregate_with(detach=True),
            "Your value is right and has no gradient: it is a loss, keep it attached.",
        ),
    ],
    hints=(
        "kept = torch.where(mask.bool(), values, 0.0) first. Then a sum and what to divide it by: mask.sum(), or "
        "rows that have tokens after dividing each row by its own length, or B * max_length.",
    ),
)


# --- pass@k -----------------------------------------------------------------------------------------------------


def _pass_cases(seed: int) -> list[tuple[int, int, int]]:
    numbers = random.Random(seed)
    n = numbers.randrange(9, 14)
    return [(n, 2, 3), (n, 4, 5), (7, 0, 2), (6, 5, 3), (8, 3, 1), (5, 1, 5)]


PASS_AT_K = Exercise(
    id="pass_at_k",
    title="pass@k",
    points=1,
    reference=test_time.pass_at_k,
    cases=_pass_cases,
    mutants=[
        Mutant(
            "with replacement",
            lambda n, n_right, k: 1 - (1 - n_right / n) ** k,
            "You seem to put the share of right samples into 1 - (1 - p)^k. That draws with replacement from the n "
            "samples and is too low on average; count the sets of k different ones.",
        ),
        Mutant(
            "all wrong",
            lambda n, n_right, k: math.comb(n - n_right, k) / math.comb(n, k),
            "That is the chance that all k are wrong. One right sample is enough: 1 minus it.",
        ),
        Mutant(
            "all right",
            lambda n, n_right, k: math.comb(n_right, k) / math.comb(n, k),
            "That is the chance that all k are right. One right sample is enough.",
        ),
        Mutant(
            "added up",
            lambda n, n_right, k: min(1.0, k * n_right / n),
            "You seem to add up the chances of k samples, which counts sets with several right ones several times.",
        ),
        Mutant(
            "any of the n",
            lambda n, n_right, k: float(n_right > 0),
            "You seem to ask whether any of the n samples is right. That is pass@n; only k of them are drawn.",
        ),
    ],
    hints=("Of the C(n, k) sets of k samples, C(n - n_right, k) hold no right one: math.comb.",),
)


# --- a vote -----------------------------------------------------------------------------------------------------


def _vote_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    low, high, other = (numbers.randrange(start, start + 20) for start in (20, 50, 75))
    votes = {
        "a plurality of 3 in 7": [high, other, low, high, low + 1, high, other + 1],
        "a tie": [high, low, other, low, high, other],
        "more silent than agreeing": [None, low, None, high, high, None],
        "nobody answered": [None, None],
        "one answer": [other],
    }
    return [Case((answers,), name=f"{name}: {answers}") for name, answers in votes.items()]


def _plurality(
    answers: Sequence[int | None],
    *,
    keep_none: bool = False,
    tie: Callable[[list[Any]], Any] = lambda tied: tied[0],
    more_than: float = 0.0,
    default: bool = True,
) -> Any:
    """A vote over counts; `tie` chooses among the most frequent, in order of their first appearance."""
    cast = [answer for answer in answers if keep_none or answer is not None]
    counts = Counter(cast)
    if not counts and default:
        return None
    most = max(counts.values())
    tied = [answer for answer, count in counts.items() if count == most]
    return tie(tied) if most > more_than * len(cast) else None


MAJORITY_VOTE = Exercise(
    id="majority_vote",
    title="Majority vote",
    points=1,
    reference=test_time.majority_vote,
    cases=_vote_cases,
    mutants=[
        Mutant(
            "None votes",
            lambda answers: _plurality(answers, keep_none=True),
            "You seem to count None as a vote. A sample without an answer abstains: leave it out before counting.",
        ),
        Mutant(
            "last of a tie",
            lambda answers: _plurality(answers, tie=lambda tied: tied[-1]),
            "Of answers with equally many votes you seem to take the one that came later. Ties go to the first: the "
            "order is that of the samples, so it favors nothing.",
        ),
        Mutant(
            "smallest of a tie",
            lambda answers: _plurality(answers, tie=min),
            "You seem to break ties by the answer's value, which favors small numbers. Ties go to the one that came "
            "first.",
        ),
        Mutant(
            "more than half",
            lambda answers: _plurality(answers, more_than=0.5),
            "You seem to ask for more than half of the votes. The most frequent answer wins, however few its votes.",
        ),
        Mutant(
            "first answer",
            lambda answers: next((answer for answer in answers if answer is not None), None),
            "You seem to return the first answer. Count them.",
        ),
        Mutant(
            "no votes",
            lambda answers: _plurality(answers, default=False),
            "Without a single vote there is no answer: return None.",
        ),
    ],
    hints=(
        "Leave out None, count, and return the most frequent; a dict keeps the order of first appearance.",
    ),
)

EXERCISES = [
    RIGHT_ANSWER,
    PASS_AT_K,
    MAJORITY_VOTE,
    GROUP_ADVANTAGES,
    CLIPPED_SURROGATE,
    KL_K3,
    AGGREGATE,
]
