"""Exercises of chapter 10, fine-tuning: masked loss, replay, frozen parts, last token, averages of weights, forgetting.

Shapes: B rows, T slots of a row, V vocabulary, D width of the residual stream.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.checks.checking import with_gradients
from llmcourse.checks.comparison import difference
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.evaluation.perplexity import TokenLoss
from llmcourse.models.classifier import last_token
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.averaging import average_checkpoints
from llmcourse.training.finetuning import FineTuning, masked_loss, with_replay
from llmcourse.training.fit import FitResult
from llmcourse.training.freezing import Trainable, choose_trainable

Parts = tuple[Tensor, Any]  # a summed loss and the number of its targets


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _logits_and_targets(g: torch.Generator, b: int, t: int, v: int) -> tuple[Tensor, Tensor]:
    """Random logits, and targets of which about half are missing; id 0 is among the others."""
    logits = 3 * torch.randn(b, t, v, generator=g)
    targets = torch.randint(v, (b, t), generator=g)
    targets = targets.masked_fill(torch.rand(b, t, generator=g) < 0.4, -100)
    targets[0, 0], targets[0, 1], targets[0, 2] = 0, v - 1, -100
    return logits, targets


# --- the masked loss --------------------------------------------------------------------------------------------


def _masked_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    cases = [Case(_logits_and_targets(g, *shape)) for shape in ((1, 4, 3), (3, 7, 11))]
    logits, targets = _logits_and_targets(g, 4, 6, 9)
    targets[2] = -100  # a row in which nothing is learned
    cases.append(Case((logits.bfloat16(), targets), name="bfloat16 logits, a row without targets"))
    return cases


def _loss_values(answer: Callable[..., Parts], case: Case) -> dict[str, Any]:
    """Total, count, and the gradient of the total, so that a detached loss is told from a right one."""
    logits, targets = case.args
    logits = logits.detach().requires_grad_()
    total, count = answer(logits, targets)
    total = torch.as_tensor(total)
    found = {"total": total.detach(), "count": int(count)}
    if not total.requires_grad:
        return found | {"gradient": "none: the loss is detached"}
    gradient = torch.autograd.grad(total, logits)[0]
    # in bfloat16 the gradient is rounded, differently by different but equally right answers
    return found | {"gradient": gradient if gradient.dtype == torch.float32 else "there"}


def _masked_with(
    *, keep: str = "targets", reduce: str = "sum", count: str = "targets", sign: int = 1, wide: bool = True
) -> Callable[[Tensor, Tensor], Parts]:
    def loss(logits: Tensor, targets: Tensor) -> Parts:
        logits = logits.float() if wide else logits
        kept = {"targets": targets != -100, "positive": targets > 0, "all": targets == targets}[keep]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        losses = -sign * log_probs.masked_fill(~kept, 0.0)  # (B, T)
        if reduce == "rows":
            rows = kept.any(1)
            return (losses[rows].sum(1) / kept[rows].sum(1)).sum(), rows.sum()
        total = losses.sum() if reduce == "sum" else losses.sum() / kept.sum()
        return total, kept.sum() if count == "targets" else torch.tensor(targets.numel())

    return loss


def _shifted_again(logits: Tensor, targets: Tensor) -> Parts:
    return masked_loss(logits[:, :-1], targets[:, 1:])


def _detached_loss(logits: Tensor, targets: Tensor) -> Parts:
    total, count = masked_loss(logits, targets)
    return total.detach(), count


MASKED_LOSS = Exercise(
    id="masked_loss",
    title="Masked loss",
    points=2,
    reference=masked_loss,
    cases=_masked_cases,
    run=_loss_values,
    mutants=[
        Mutant(
            "mean",
            _masked_with(reduce="mean"),
            "You seem to return the mean. Return the sum and the number of targets: only the loop knows how many "
            "targets all micro-batches have together.",
        ),
        Mutant(
            "no mask",
            _masked_with(keep="all"),
            "You seem to count positions whose target is -100, as if it were id 0: prompts and padding would be "
            "learned. Leave them out of the sum and of the count.",
        ),
        Mutant(
            "id 0 left out",
            _masked_with(keep="positive"),
            "You seem to leave out every target below 1. Id 0 is a token like any other, here the end of a text; only "
            "-100 means that there is no target.",
        ),
        Mutant(
            "all positions counted",
            _masked_with(count="all"),
            "Your sum is right, but you seem to count all positions. Divided by that, the loss of a batch would depend "
            "on how much padding it has.",
        ),
        Mutant(
            "conversations alike",
            _masked_with(reduce="rows"),
            "You seem to average each row and to count rows, so that a token of a short answer weighs more than one of "
            "a long answer. Every target counts the same.",
        ),
        Mutant(
            "shifted again",
            _shifted_again,
            "You seem to shift the targets once more. They are aligned already: the target at position t is the token "
            "after it.",
        ),
        Mutant(
            "half precision",
            _masked_with(wide=False),
            "You seem to take the logarithm in the logits' own precision. bfloat16 keeps eight bits, so the sum is off "
            "in its third digit: convert the logits with `.float()` first.",
        ),
        Mutant(
            "sign",
            _masked_with(sign=-1),
            "Your total is negative: the loss is the sum of -ln p, which is at least 0.",
        ),
        Mutant(
            "detached",
            _detached_loss,
            "Your total is cut off from the graph (`.item()`, `.detach()` or `no_grad`), so nothing would be learned.",
        ),
    ],
    hints=(
        "Flatten to (B T, V) and (B T,): `F.cross_entropy(..., ignore_index=-100, reduction='sum')` in float32.",
    ),
)


# --- replay -----------------------------------------------------------------------------------------------------


class _Recorded(nn.Module):
    """A model that was run before: "tokens" name the logits to return."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[int(tokens)]


def replay_loss(
    logits: Tensor, targets: Tensor, replay_logits: Tensor, replay_targets: Tensor, share: float
) -> Parts:
    """The loss of `with_replay(share)` as (total, count), from logits (B, T, V) and targets (B, T) of both batches."""
    batch = {
        "tokens": torch.tensor(0),
        "targets": targets,
        "replay_tokens": torch.tensor(1),
        "replay_targets": replay_targets,
    }
    total, count, _ = with_replay(share)(_Recorded(logits, replay_logits), batch)
    return total, count


def _replay_cases(seed: int) -> list[Case]:
    g, numbers = _generator(seed), random.Random(seed)
    cases = []
    for instructions, text in (((2, 5, 7), (1, 4, 7)), ((3, 4, 6), (2, 9, 6))):
        logits, targets = _logits_and_targets(g, *instructions)
        replay_logits, replay_targets = _logits_and_targets(g, *text)
        replay_targets = replay_targets.abs() % text[2]  # of text, every token is a target
        args = (logits, targets, replay_logits, replay_targets, numbers.uniform(0.1, 0.4))
        cases.append(Case(args))
    return cases


def _replay_values(answer: Callable[..., Parts], case: Case) -> dict[str, Any]:
    """Total, count, and what reaches both sets of logits."""
    logits, targets, replay_logits, replay_targets, share = case.args
    leaves = [logits.detach().requires_grad_(), replay_logits.detach().requires_grad_()]
    total, count = answer(leaves[0], targets, leaves[1], replay_targets, share)
    total = torch.as_tensor(total)
    found = {"total": total.detach(), "count": int(count)}
    if not total.requires_grad:
        return found | {"gradients": "none: the loss is detached"}
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return found | {"gradients": ["none" if part is None else part for part in gradients]}


def _replay_with(mix: Callable[..., tuple[Any, Any]], detach: bool = False) -> Callable[..., Parts]:
    """A mixture of (total, count, replay total, replay count, share)."""

    def loss(
        logits: Tensor, targets: Tensor, replay_logits: Tensor, replay_targets: Tensor, share: float
    ) -> Parts:
        replay_logits = replay_logits.detach() if detach else replay_logits
        return mix(*masked_loss(logits, targets), *masked_loss(replay_logits, replay_targets), share)

    return loss


REPLAY_LOSS = Exercise(
    id="replay_loss",
    title="Loss with replay",
    points=2,
    reference=replay_loss,
    cases=_replay_cases,
    run=_replay_values,
    mutants=[
        Mutant(
            "sums mixed",
            _replay_with(lambda total, n, replay, m, s: ((1 - s) * total + s * replay, n)),
            "You seem to mix the sums. The batch with more targets then counts more, and `share` no longer says how "
            "much: mix the means, each over its own targets.",
        ),
        Mutant(
            "shares swapped",
            _replay_with(lambda total, n, replay, m, s: (s * total + (1 - s) * replay / m * n, n)),
            "You seem to give the weight `share` to the instructions. It is the weight of the replayed text.",
        ),
        Mutant(
            "mean as total",
            _replay_with(lambda total, n, replay, m, s: ((1 - s) * total / n + s * replay / m, n)),
            "You return the mixed mean as the total, and the loop divides by the count once more: the step would "
            "depend on the number of targets. Multiply the mean by the count that you return.",
        ),
        Mutant(
            "all targets counted",
            _replay_with(
                lambda total, n, replay, m, s: (((1 - s) * total / n + s * replay / m) * (n + m), n + m)
            ),
            "Your count includes the replayed targets. The loop's unit is the instruction target: with replay in the "
            "count, batches with few instructions would weigh as much as those with many.",
        ),
        Mutant(
            "pooled",
            _replay_with(lambda total, n, replay, m, s: ((total + replay) / (n + m) * n, n)),
            "You seem to pool all targets and to ignore `share`: the mixture is then whatever the batch sizes happen "
            "to be.",
        ),
        Mutant(
            "added",
            _replay_with(lambda total, n, replay, m, s: (total + s * replay / m * n, n)),
            "You seem to add the replayed loss without taking its share from the instructions: the weights 1 - share "
            "and share sum to 1.",
        ),
        Mutant(
            "replay detached",
            _replay_with(
                lambda total, n, replay, m, s: ((1 - s) * total + s * replay / m * n, n), detach=True
            ),
            "No gradient reaches the replayed logits. The number is right, but nothing would hold the model to its "
            "old text.",
        ),
    ],
    hints=(
        "mean = (1 - share) * total / count + share * replay_total / replay_count; return it times count.",
    ),
)


# --- which parameters move --------------------------------------------------------------------------------------


def trainable_names(names: Sequence[str], variant: str, n_layers: int, tied: bool) -> list[str]:
    """Names of the parameters that move after `choose_trainable(model, variant)`.

    Args:
        names: the model's parameters before; a tied head has none of its own.
        variant: "full", "head" or "last:K".
        n_layers: blocks of the model.
        tied: whether the head shares the embedding's matrix; where it must be untied, its name is "head.weight".
    """
    model = _tiny(n_layers, tied)
    assert list(names) == [name for name, _ in model.named_parameters()]
    choose_trainable(model, variant)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tiny(n_layers: int, tied: bool) -> Transformer:
    sizes = {"vocab_size": 5, "context_length": 2, "d_model": 4, "n_heads": 1, "n_kv_heads": 1, "d_ff": 3}
    return Transformer(ModelConfig(n_layers=n_layers, tie_embeddings=tied, **sizes))


def _trainable_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    deep = 11 + numbers.randrange(3)
    settings = [
        ("full", 2, True), ("full", 2, False), ("head", 3, True), ("head", 3, False), ("last:1", 4, False),
        ("last:2", 5, True), ("last:3", 3, False), (f"last:{deep - 8}", deep, numbers.random() < 0.5),
    ]  # fmt: skip
    return [
        Case(([name for name, _ in _tiny(n, tied).named_parameters()], variant, n, tied))
        for variant, n, tied in settings
    ]


def _sorted_names(answer: Callable[..., Any], case: Case) -> list[str]:
    """In any order, as a list or a set."""
    return sorted(answer(*case.args))


def _names_with(
    *,
    block: Callable[[int, int, int], bool] = lambda i, k, n: i >= n - k,
    norm: bool = True,
    tied_head: str = "own",
    embedding: bool = False,
    full_head: bool = False,
    number: Callable[[str], int] = lambda name: int(name.split(".")[1]),
) -> Callable[..., list[str]]:
    def answer(names: Sequence[str], variant: str, n_layers: int, tied: bool) -> list[str]:
        head = {"own": ["head.weight"], "shared": ["embedding.weight"], "none": []}[
            tied_head if tied else "own"
        ]
        if variant == "full":
            return list(names) + (["head.weight"] if tied and full_head else [])
        if variant == "head":
            return head
        k = int(variant.split(":")[1])
        moving = [name for name in names if name.startswith("blocks") and block(number(name), k, n_layers)]
        moving += ["final_norm.weight"] if norm else []
        return sorted({*moving, *head, *(["embedding.weight"] if embedding else [])})

    return answer


TRAINABLE_NAMES = Exercise(
    id="trainable_names",
    title="Which parameters move",
    points=2,
    reference=trainable_names,
    cases=_trainable_cases,
    run=_sorted_names,
    mutants=[
        Mutant(
            "first blocks",
            _names_with(block=lambda i, k, n: i < k),
            "You seem to train the first K blocks. `last:K` names those next to the head: then the backward pass ends "
            "K blocks below it, and everything further down costs a forward pass only.",
        ),
        Mutant(
            "one block too few",
            _names_with(block=lambda i, k, n: i > n - k),
            "You seem to train K - 1 blocks. Blocks are numbered from 0, so the last K are those from n_layers - K on.",
        ),
        Mutant(
            "one digit",
            _names_with(number=lambda name: int(name[len("blocks.")])),
            "You seem to read one digit of a block's number, or to compare numbers as text: block 10 is not block 1, "
            "and '10' < '2'. Split the name at the dots and convert to int.",
        ),
        Mutant(
            "final norm frozen",
            _names_with(norm=False),
            "You seem to freeze the final norm. It stands between the last block and the head and moves with them.",
        ),
        Mutant(
            "shared head",
            _names_with(tied_head="shared"),
            "You seem to train the matrix that embedding and head share. Then the input of the frozen blocks moves as "
            "well, and nothing below the head is frozen in effect: the head is given a copy of its own first, "
            "`head.weight`.",
        ),
        Mutant(
            "tied head forgotten",
            _names_with(tied_head="none"),
            "You seem to leave out a tied head, because its name is not among the parameters. It is untied first and "
            "then has one: `head.weight`.",
        ),
        Mutant(
            "embedding moves",
            _names_with(embedding=True),
            "You seem to train the embedding with the last blocks. It is the lowest layer of all: the backward pass "
            "would have to go through every frozen block to reach it.",
        ),
        Mutant(
            "full unties",
            _names_with(full_head=True),
            "You seem to untie the head for full fine-tuning too. When everything moves the tie stays, and the shared "
            "matrix has one name.",
        ),
    ],
    hints=("Three cases: all names; the head; blocks with number >= n_layers - K, final norm and head.",),
)


# --- the last token ---------------------------------------------------------------------------------------------


def _last_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    cases = []
    for b, t, d in ((2, 3, 5), (4, 7, 3), (1, 6, 2)):
        hidden = torch.randn(b, t, d, generator=g)
        lengths = torch.randint(1, t, (b,), generator=g)
        if b > 1:
            lengths[0], lengths[-1] = t, 2
        for row, length in zip(hidden, lengths.tolist(), strict=True):
            row[length:] += 4  # what stands in padding is not noise around 0
        cases.append(Case((hidden, lengths)))
    return cases


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), index]


def _mean_of_text(hidden: Tensor, lengths: Tensor) -> Tensor:
    inside = (torch.arange(hidden.shape[1]) < lengths[:, None]).unsqueeze(-1)  # (B, T, 1)
    return (hidden * inside).sum(1) / lengths[:, None]


LAST_TOKEN = Exercise(
    id="last_token",
    title="Last token",
    points=2,
    reference=last_token,
    cases=_last_cases,
    run=with_gradients,
    mutants=[
        Mutant(
            "last slot",
            lambda hidden, lengths: hidden[:, -1],
            "You seem to take the last slot of every row, which is padding in the shorter ones. The last token of row "
            "b stands in slot lengths[b] - 1.",
        ),
        Mutant(
            "one too far",
            lambda hidden, lengths: _rows(hidden, lengths.clamp(max=hidden.shape[1] - 1)),
            "You seem to take slot lengths[b], the first one of the padding. Slots are numbered from 0.",
        ),
        Mutant(
            "first token",
            lambda hidden, lengths: hidden[:, 0],
            "You seem to take the first slot, where BERT has its [CLS]. Under a causal mask the first position sees "
            "nothing but itself: its vector is the same for every text that starts alike.",
        ),
        Mutant(
            "mean of all slots",
            lambda hidden, lengths: hidden.mean(1),
            "You seem to average over all slots, padding included, so that a text's vector depends on the longest text "
            "of its batch.",
        ),
        Mutant(
            "mean of the text",
            _mean_of_text,
            "You seem to average over the text's tokens. That is another pooling, without the padding's harm; asked "
            "for is the last token, the only one that has read everything.",
        ),
        Mutant(
            "longest row's end",
            lambda hidden, lengths: hidden[:, int(lengths.max()) - 1],
            "You seem to take the end of the longest row in every row. Each row has its own length.",
        ),
        Mutant(
            "detached",
            lambda hidden, lengths: _rows(hidden.detach(), lengths - 1),
            "No gradient reaches the hidden states: the head would learn, and the transformer below it would not.",
        ),
    ],
    hints=("hidden[torch.arange(B), lengths - 1]: one row number and one slot for each row.",),
)


# --- averages of weights ----------------------------------------------------------------------------------------


def average(
    state_dicts: Sequence[dict[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of checkpoints, by the package's `average_checkpoints`."""
    return average_checkpoints(state_dicts, weights)


def _average_cases(seed: int) -> list[Case]:
    g, numbers = _generator(seed), random.Random(seed)
    cases = []
    # in bfloat16 a sum of many small terms stops growing: five checkpoints over and over
    for n, repeats, weighted in ((2, 1, True), (3, 1, False), (5, 150, True)):
        shapes = {"embedding.weight": (5, 3), "final_norm.weight": (3,)}
        states = [
            {name: torch.randn(shape, generator=g) + 1 for name, shape in shapes.items()}
            | {"half": (torch.rand(7, generator=g) + 1.5).bfloat16(), "steps": torch.tensor(2 * seed + 37)}
            for _ in range(n)
        ]
        weights = [numbers.uniform(0.5, 3.0) for _ in range(n * repeats)] if weighted else None
        cases.append(Case((states * repeats, weights)))
    return cases


def _average_with(
    *, normalize: bool = True, use: str = "weights", counters: str = "kept", wide: bool = True
) -> Callable[..., dict[str, Tensor]]:
    def answer(
        state_dicts: Sequence[dict[str, Tensor]], weights: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        shares = torch.tensor([1.0] * len(state_dicts) if weights is None or use == "none" else list(weights))
        shares = shares.softmax(0) if use == "softmax" else shares / (shares.sum() if normalize else 1.0)
        found = {}
        for name, first in state_dicts[0].items():
            if not first.is_floating_point() and counters == "kept":
                found[name] = first.clone()
                continue
            total = torch.zeros_like(first, dtype=torch.float32 if wide else first.dtype)
            for share, state in zip(shares.tolist(), state_dicts, strict=True):
                total = total + state[name].to(total.dtype) * share
            found[name] = total if counters == "mean" and name == "steps" else total.to(first.dtype)
        return found

    return answer


def _states_differ(expected: dict[str, Tensor], got: Any) -> str | None:
    """The difference of two state dicts; a bfloat16 number that lies between two may be rounded to either."""
    if not isinstance(got, dict) or got.keys() != expected.keys():
        return difference(expected, got)
    exact = [{name: value for name, value in state.items() if name != "half"} for state in (expected, got)]
    return difference(*exact) or difference(expected["half"], got["half"], rtol=0.01, where="['half']")


def _in_place(
    state_dicts: Sequence[dict[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    found = average_checkpoints(state_dicts, weights)
    for name, tensor in state_dicts[0].items():
        tensor.copy_(found[name])
    return dict(state_dicts[0])


AVERAGE = Exercise(
    id="average",
    title="Average of checkpoints",
    points=2,
    reference=average,
    cases=_average_cases,
    compare=_states_differ,
    mutants=[
        Mutant(
            "not normalized",
            _average_with(normalize=False),
            "You seem to leave out the division by the sum of the weights (the number of checkpoints where there are "
            "none): the model would be scaled up as a whole.",
        ),
        Mutant(
            "weights ignored",
            _average_with(use="none"),
            "You seem to ignore `weights`: all checkpoints count the same.",
        ),
        Mutant(
            "softmax",
            _average_with(use="softmax"),
            "You seem to put the weights through a softmax. Divide them by their sum: twice the weight is twice the "
            "share.",
        ),
        Mutant(
            "counters averaged",
            _average_with(counters="mean"),
            "You turn the integer counter into a float. What is not floating has no mean: take it over as it is, with "
            "its type.",
        ),
        Mutant(
            "narrow sums",
            _average_with(wide=False),
            "You seem to add in the tensors' own type. A bfloat16 sum keeps eight bits, and small terms "
            "round away as it grows: add in float32 or float64 and convert at the end.",
        ),
        Mutant(
            "in place",
            _in_place,
            "You write the mean into the first checkpoint. A state dict shares its memory with the model it came "
            "from, so the model would change: start from zeros or a copy.",
        ),
    ],
    hints=("For each name: zeros in float32, add share * tensor for every checkpoint, convert back.",),
)


# --- forgetting -------------------------------------------------------------------------------------------------


def forgetting(before: Sequence[float], after: Sequence[float], counts: Sequence[int]) -> float:
    """Rise of the loss on held-out pre-training text, in nats per token, as `FineTuning.forgetting` reports it.

    Args:
        before: summed nats of each document under the model before fine-tuning.
        after: the same after it.
        counts: target tokens of each document.
    """
    losses = [
        TokenLoss(total_nats=sum(nats), n_tokens=sum(counts), standard_error=0.0) for nats in (before, after)
    ]
    measured = [{"pretraining_loss": loss.nats_per_token} for loss in losses]
    run = FineTuning(fit=FitResult(), trainable=Trainable(1, 1), before=measured[0], after=measured[1])
    return run.forgetting


def _forgetting_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    cases = []
    for n in (1, 4, 13):
        counts = [numbers.randrange(6, 150) for _ in range(n)]
        before = [numbers.uniform(0.7, 1.6) * count for count in counts]
        after = [
            nats + numbers.uniform(-0.1, 1.2) * count for nats, count in zip(before, counts, strict=True)
        ]
        cases.append(Case((before, after, counts)))
    return cases


def _mean_of_documents(before: Sequence[float], after: Sequence[float], counts: Sequence[int]) -> float:
    rises = [(b - a) / n for a, b, n in zip(before, after, counts, strict=True)]
    return sum(rises) / len(rises)


def _perplexity_rise(before: Sequence[float], after: Sequence[float], counts: Sequence[int]) -> float:
    n = sum(counts)
    return math.exp(sum(after) / n) - math.exp(sum(before) / n)


FORGETTING = Exercise(
    id="forgetting",
    title="Forgetting",
    points=1,
    reference=forgetting,
    cases=_forgetting_cases,
    rtol=1e-6,
    mutants=[
        Mutant(
            "mean of documents",
            _mean_of_documents,
            "You seem to average each document's rise. The loss per token is a sum over a sum, so long documents count "
            "more, before and after.",
        ),
        Mutant(
            "sign",
            lambda before, after, counts: (sum(before) - sum(after)) / sum(counts),
            "You seem to subtract the wrong way round: forgetting is positive where the loss has risen.",
        ),
        Mutant(
            "per document",
            lambda before, after, counts: (sum(after) - sum(before)) / len(counts),
            "You seem to divide by the number of documents. The unit is nats per token: divide by all tokens.",
        ),
        Mutant(
            "relative",
            lambda before, after, counts: sum(after) / sum(before) - 1,
            "You seem to give the rise as a fraction of the loss before. Its size would then depend on how well the "
            "model was trained; asked for is the difference in nats per token.",
        ),
        Mutant(
            "perplexity",
            _perplexity_rise,
            "You seem to subtract perplexities. The same number of lost nats would count more the worse the model is: "
            "subtract before you take the exponential.",
        ),
        Mutant(
            "bits",
            lambda before, after, counts: (sum(after) - sum(before)) / sum(counts) / math.log(2),
            "Your result seems to be in bits. The inputs are nats, and so is the answer.",
        ),
    ],
    hints=("Sum the nats, sum the tokens, divide once, subtract: after - before.",),
)

EXERCISES = [MASKED_LOSS, FORGETTING, REPLAY_LOSS, TRAINABLE_NAMES, LAST_TOKEN, AVERAGE]
