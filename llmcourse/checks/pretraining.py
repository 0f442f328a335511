"""Exercises of chapter 04, pre-training: floor, loss, schedules, optimizers, accumulation, clipping.

Shapes: B batch, T time, V vocabulary; m, n rows and columns of a weight matrix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.evaluation.perplexity import TokenLoss
from llmcourse.training import optimizers, schedules
from llmcourse.training.fit import scale_and_clip
from llmcourse.training.pretraining import next_token_loss

Batch = dict[str, Tensor]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the entropy floor ------------------------------------------------------------------------------------------


def entropy_floor(bits: list[float], token_counts: list[int]) -> float:
    """The lowest expected loss in nats per token for documents of known information content.

    Args:
        bits: information content of each document, in bits.
        token_counts: tokens of each document, its end-of-text token not included.
    """
    return math.log(2) * sum(bits) / (sum(token_counts) + len(token_counts))


def _floor_cases(seed: int) -> list[tuple[list[float], list[int]]]:
    numbers = random.Random(seed)
    cases = []
    for n in (1, 3, 17):
        counts = [numbers.randrange(5, 120) for _ in range(n)]
        cases.append(([numbers.uniform(0.3, 2.5) * count for count in counts], counts))
    return cases


def _mean_of_ratios(bits: list[float], token_counts: list[int]) -> float:
    ratios = [b / (n + 1) for b, n in zip(bits, token_counts, strict=True)]
    return math.log(2) * sum(ratios) / len(ratios)


FLOOR = Exercise(
    id="floor",
    title="Entropy floor",
    points=2,
    reference=entropy_floor,
    cases=_floor_cases,
    rtol=1e-6,
    mutants=[
        Mutant(
            "mean of ratios",
            _mean_of_ratios,
            "You seem to average each document's bits per token. The loss of a corpus divides the sum of all nats by "
            "the number of all tokens, so long documents count more.",
        ),
        Mutant(
            "no end of text",
            lambda bits, token_counts: math.log(2) * sum(bits) / sum(token_counts),
            "You seem to leave out the end-of-text tokens. Each document has one more target than it has tokens, "
            "because the model must also predict that the document ends.",
        ),
        Mutant(
            "bits",
            lambda bits, token_counts: sum(bits) / (sum(token_counts) + len(token_counts)),
            "Your floor seems to be in bits per token. One bit is ln 2 nats.",
        ),
        Mutant(
            "divided by ln 2",
            lambda bits, token_counts: sum(bits) / (sum(token_counts) + len(token_counts)) / math.log(2),
            "You seem to divide by ln 2, which turns nats into bits. From bits to nats it is a multiplication.",
        ),
    ],
    hints=("Sum first and divide last; count one end-of-text token per document.",),
)


# --- bits per byte ----------------------------------------------------------------------------------------------


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """Bits of code per byte of a text of `n_bytes` bytes that took `n_tokens` tokens."""
    return TokenLoss(
        total_nats=nats_per_token * n_tokens, n_tokens=n_tokens, standard_error=0.0
    ).bits_per_byte(n_bytes)


def _byte_cases(seed: int) -> list[tuple[float, int, int]]:
    numbers = random.Random(seed)
    return [
        (numbers.uniform(0.4, 7.0), n_tokens, round(n_tokens * numbers.uniform(2.1, 4.9)))
        for n_tokens in (37, 5_003)
    ]


BITS_PER_BYTE = Exercise(
    id="bits_per_byte",
    title="Bits per byte",
    points=1,
    reference=bits_per_byte,
    cases=_byte_cases,
    rtol=1e-6,
    mutants=[
        Mutant(
            "nats per byte",
            lambda nats_per_token, n_tokens, n_bytes: nats_per_token * n_tokens / n_bytes,
            "You seem to give nats per byte. Divide by ln 2 to have bits.",
        ),
        Mutant(
            "bits per token",
            lambda nats_per_token, n_tokens, n_bytes: nats_per_token / math.log(2),
            "You seem to give bits per token. Multiply by the tokens that the text took and divide by its bytes.",
        ),
        Mutant(
            "inverted",
            lambda nats_per_token, n_tokens, n_bytes: nats_per_token * n_bytes / n_tokens / math.log(2),
            "You seem to multiply by bytes per token. A token covers several bytes, so its bits are shared among them.",
        ),
        Mutant(
            "times ln 2",
            lambda nats_per_token, n_tokens, n_bytes: nats_per_token * math.log(2) * n_tokens / n_bytes,
            "You seem to multiply by ln 2. A nat is 1.44 bits, so the number of bits is the larger one.",
        ),
    ],
    hints=("All nats of the text, in bits, over all bytes of the text.",),
)


# --- the next-token loss ----------------------------------------------------------------------------------------


class _Given(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits


def masked_next_token_loss(logits: Tensor, tokens: Tensor, is_target: Tensor) -> tuple[Tensor, int]:
    """Summed next-token loss and the number of targets, by the package's `next_token_loss`.

    Args:
        logits: (B, T, V); position t holds the prediction of token t + 1.
        tokens: (B, T) int64.
        is_target: (B, T) bool; which tokens are to be predicted. The first of a row never is.
    """
    targets = tokens[:, 1:].masked_fill(~is_target[:, 1:], -100)
    batch = {"tokens": tokens[:, :-1], "targets": targets}
    total, count, _ = next_token_loss(_Given(logits[:, :-1]), batch)
    return total, int(count)


def _loss_cases(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    g = _generator(seed)
    cases = []
    for b, t, v in ((1, 4, 3), (3, 7, 11)):
        logits = 3 * torch.randn(b, t, v, generator=g)
        tokens = torch.randint(v, (b, t), generator=g)
        is_target = torch.rand(b, t, generator=g) < 0.7
        is_target[:, 0] = True  # must be ignored: nothing predicts it
        is_target[0, 2] = False
        is_target[0, -1] = True
        cases.append((logits, tokens, is_target))
    return cases


def _loss_with(
    *, shift: int = 1, mask: str = "target", reduce: str = "sum"
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]:
    def loss(logits: Tensor, tokens: Tensor, is_target: Tensor) -> tuple[Tensor, int]:
        n = tokens.shape[1] - shift
        losses = F.cross_entropy(logits[:, :n].transpose(1, 2), tokens[:, shift:], reduction="none")
        keep = {
            "target": is_target[:, shift:],
            "input": is_target[:, :n],
            "none": torch.ones_like(is_target[:, shift:]),
        }[mask]
        total = losses[keep].sum()
        count = int(keep.sum())
        return (total if reduce == "sum" else total / count), count

    return loss


def _backward_shift(logits: Tensor, tokens: Tensor, is_target: Tensor) -> tuple[Tensor, int]:
    losses = F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none")
    return losses[is_target[:, 1:]].sum(), int(is_target[:, 1:].sum())


def _loss_values(answer: Callable[..., tuple[Tensor, int]], case: Case) -> dict[str, Any]:
    """Total, count and the gradient of the total, so that a detached loss is told from a right one."""
    logits, tokens, is_target = case.args
    logits = logits.detach().requires_grad_()
    total, count = answer(logits, tokens, is_target)
    total = torch.as_tensor(total)
    gradient = torch.autograd.grad(total, logits)[0] if total.requires_grad else "none: the loss is detached"
    return {"total": total.detach(), "count": int(count), "gradient": gradient}


def _detached(logits: Tensor, tokens: Tensor, is_target: Tensor) -> tuple[float, int]:
    total, count = masked_next_token_loss(logits, tokens, is_target)
    return total.item(), count


NEXT_TOKEN_LOSS = Exercise(
    id="next_token_loss",
    title="Next-token loss",
    points=2,
    reference=masked_next_token_loss,
    cases=_loss_cases,
    run=_loss_values,
    mutants=[
        Mutant(
            "no shift",
            _loss_with(shift=0),
            "You seem to compare position t with token t: the model would be trained to copy its input. Position t "
            "predicts token t + 1.",
        ),
        Mutant(
            "shifted backwards",
            _backward_shift,
            "You seem to shift the wrong way: position t + 1 is compared with token t, which it has already seen.",
        ),
        Mutant(
            "mask of the input",
            _loss_with(mask="input"),
            "You seem to mask by the token that predicts. The mask belongs to the token that is predicted, so it is "
            "shifted together with the targets.",
        ),
        Mutant(
            "no mask",
            _loss_with(mask="none"),
            "You seem to ignore `is_target`: padding and prompts would be trained on.",
        ),
        Mutant(
            "mean",
            _loss_with(reduce="mean"),
            "You seem to return the mean. Return the sum and the count: only the loop knows how many targets the "
            "whole batch has.",
        ),
        Mutant(
            "detached",
            _detached,
            "Your total is cut off from the graph (`.item()`, `.detach()` or `no_grad`), so nothing would be learned.",
        ),
    ],
    hints=(
        "Drop the last position of the logits and the first token; `F.cross_entropy(..., reduction='none')`.",
    ),
)


# --- schedules --------------------------------------------------------------------------------------------------


def _curve(answer: Callable[..., float], case: Case) -> list[float]:
    """The factor at every step of a run."""
    return [float(answer(step, *case.args, **case.kwargs)) for step in range(case.kwargs["steps"] + 3)]


def _schedule_cases(**extra: float) -> Callable[[int], list[Case]]:
    def cases(seed: int) -> list[Case]:
        numbers = random.Random(seed)
        found = [Case(kwargs={"steps": 20, "warmup_steps": 0, **extra})]
        for final_fraction in (0.0, 0.1):
            steps, warmup = numbers.randrange(40, 90), numbers.randrange(5, 13)
            found.append(
                Case(kwargs=dict(steps=steps, warmup_steps=warmup, final_fraction=final_fraction) | extra)
            )
        return found

    return cases


def _cosine_no_warmup(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    return schedules.cosine(step, steps=steps, warmup_steps=0, final_fraction=final_fraction)


def _cosine_over_all(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    whole = schedules.cosine(step, steps=steps, warmup_steps=0, final_fraction=final_fraction)
    return schedules.warm_up(step, warmup_steps) * whole


def _cosine_to_zero(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    return schedules.cosine(step, steps=steps, warmup_steps=warmup_steps, final_fraction=0.0)


def _cosine_from_zero(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    return schedules.cosine(step, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)


def _cosine_rises_again(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    fraction = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    decay = final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(2 * math.pi * min(1.0, fraction)))
    return schedules.warm_up(step, warmup_steps) * decay


COSINE = Exercise(
    id="cosine",
    title="Warm-up and cosine",
    points=2,
    reference=schedules.cosine,
    cases=_schedule_cases(),
    run=_curve,
    rtol=1e-6,
    mutants=[
        Mutant(
            "no warm-up",
            _cosine_no_warmup,
            "You seem to leave out the warm-up: the factor rises linearly over the first `warmup_steps` steps.",
        ),
        Mutant(
            "starts at zero",
            _cosine_from_zero,
            "Your warm-up starts at 0, so the first step is wasted. Step 0 already has the factor 1 / warmup_steps.",
        ),
        Mutant(
            "cosine over all steps",
            _cosine_over_all,
            "Your cosine seems to start at step 0 and not where the warm-up ends: the peak is never reached.",
        ),
        Mutant(
            "always to zero",
            _cosine_to_zero,
            "You seem to ignore `final_fraction`: the factor must end there and not at 0.",
        ),
        Mutant(
            "whole period",
            _cosine_rises_again,
            "Your cosine runs through a whole period and rises again. Half a period, 0 to pi, takes it from 1 to -1.",
        ),
    ],
    hints=("Let f run from 0 at the end of warm-up to 1 at `steps`; the cosine of pi f falls from 1 to -1.",),
)


def _wsd_decay_from_warmup(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    return schedules.linear(step, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)


def _wsd_no_decay(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    return schedules.warm_up(step, warmup_steps)


def _wsd_fraction_of_stable(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    fraction = decay_fraction * (steps - warmup_steps) / steps
    return schedules.warmup_stable_decay(
        step, steps=steps, warmup_steps=warmup_steps, decay_fraction=fraction, final_fraction=final_fraction
    )


def _wsd_drop(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    decay_steps = max(1, round(decay_fraction * steps))
    return schedules.warm_up(step, warmup_steps) if step < steps - decay_steps else final_fraction


def _wsd_swapped(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    return schedules.warmup_stable_decay(
        step,
        steps=steps,
        warmup_steps=warmup_steps,
        decay_fraction=1 - decay_fraction,
        final_fraction=final_fraction,
    )


WSD = Exercise(
    id="wsd",
    title="Warm-up, stable, decay",
    points=2,
    reference=schedules.warmup_stable_decay,
    cases=_schedule_cases(decay_fraction=0.3),
    run=_curve,
    rtol=1e-6,
    mutants=[
        Mutant(
            "decays at once",
            _wsd_decay_from_warmup,
            "Your factor falls right after warm-up. It stays at 1 until the last `decay_fraction` of the run.",
        ),
        Mutant(
            "never decays",
            _wsd_no_decay,
            "Your factor never falls: the last `decay_fraction` of all steps goes linearly to `final_fraction`.",
        ),
        Mutant(
            "fraction of the rest",
            _wsd_fraction_of_stable,
            "Your decay is `decay_fraction` of the steps after warm-up. It is a fraction of all steps.",
        ),
        Mutant(
            "a cliff",
            _wsd_drop,
            "Your factor jumps to the final value. The decay is a straight line: the settling takes time.",
        ),
        Mutant(
            "fractions swapped",
            _wsd_swapped,
            "Your plateau has the length that the decay should have: `decay_fraction` is the part at the end.",
        ),
    ],
    hints=("decay_steps = round(decay_fraction * steps); how many of them lie behind `step`?",),
)


# --- AdamW ------------------------------------------------------------------------------------------------------


def _adamw_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    cases = []
    for shape, step in (((3,), 1), ((4, 5), 2), ((2, 3), 11)):
        tensors = [torch.randn(shape, generator=g), 0.1 * torch.randn(shape, generator=g)]
        if step == 1:
            tensors += [torch.zeros(shape), torch.zeros(shape)]
        else:
            tensors += [0.05 * torch.randn(shape, generator=g), 0.01 * torch.rand(shape, generator=g)]
        settings = {"lr": 0.01 * step, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
        cases.append(Case((*tensors, step), settings, name=f"step {step}"))
    return cases


def _updated(answer: Callable[..., None], case: Case) -> list[Tensor]:
    """The three tensors that an in-place step must have changed."""
    parameter, gradient, first, second, step = case.args
    answer(parameter, gradient, first, second, step, **case.kwargs)
    return [parameter, first, second]


def _adamw_with(
    *,
    correct: bool = True,
    decay: str = "decoupled",
    eps_inside: bool = False,
    square: bool = True,
    root: bool = True,
) -> Callable[..., None]:
    def step_function(
        parameter: Tensor,
        gradient: Tensor,
        first_moment: Tensor,
        second_moment: Tensor,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        if decay == "l2":
            gradient = gradient + weight_decay * parameter
        elif decay == "decoupled":
            parameter.mul_(1 - lr * weight_decay)
        elif decay == "without lr":
            parameter.mul_(1 - weight_decay)
        first_moment.lerp_(gradient, 1 - betas[0])
        second_moment.lerp_(gradient**2 if square else gradient.abs(), 1 - betas[1])
        m = first_moment / (1 - betas[0] ** step) if correct else first_moment
        v = second_moment / (1 - betas[1] ** step) if correct else second_moment
        scale = (v + eps).sqrt() if eps_inside else (v.sqrt() if root else v) + eps
        parameter.sub_(lr * m / scale)

    return step_function


ADAMW = Exercise(
    id="adamw",
    title="AdamW step",
    points=3,
    reference=optimizers.adamw_step,
    cases=_adamw_cases,
    run=_updated,
    may_change_inputs=True,
    mutants=[
        Mutant(
            "no bias correction",
            _adamw_with(correct=False),
            "Your moments are not bias-corrected: both start at 0, so divide them by 1 - beta ** step.",
        ),
        Mutant(
            "L2 instead of decay",
            _adamw_with(decay="l2"),
            "You seem to add the decay to the gradient. That is Adam with L2 regularization: the decay passes through "
            "the moments and is divided by them. Decoupled decay shrinks the parameter itself.",
        ),
        Mutant(
            "decay without the learning rate",
            _adamw_with(decay="without lr"),
            "Your decay is not multiplied by the learning rate, so it would not follow the schedule.",
        ),
        Mutant(
            "no decay",
            _adamw_with(decay="none"),
            "Your parameters do not decay: multiply them by 1 - lr * weight_decay.",
        ),
        Mutant(
            "eps inside the root",
            _adamw_with(eps_inside=True),
            "You seem to add eps under the root. It is added after it: sqrt(v) + eps.",
        ),
        Mutant(
            "gradient not squared",
            _adamw_with(square=False),
            "Your second moment does not average the squared gradient.",
        ),
        Mutant(
            "no root",
            _adamw_with(root=False),
            "You seem to divide by the second moment and not by its root: the step would depend on the loss's scale.",
        ),
    ],
    hints=("In this order: decay, first moment, second moment, correction, update; all in place.",),
)


# --- Newton-Schulz ----------------------------------------------------------------------------------------------


def _matrix_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    wide, tall = torch.randn(3, 8, generator=g), torch.randn(9, 4, generator=g)
    return [
        Case((5 * wide,), name="a wide matrix"),
        Case((0.01 * tall,), name="a tall matrix"),
        Case(
            (torch.diag(torch.tensor([1.0, 0.3, 0.02])),),
            {"iterations": 2},
            name="diag(1, 0.3, 0.02), 2 iterations",
        ),
    ]


def _newton_schulz_with(
    *,
    normalize: str = "frobenius",
    transpose: bool = True,
    coefficients: tuple[float, float, float] = optimizers.NEWTON_SCHULZ_COEFFICIENTS,
    extra: int = 0,
) -> Callable[..., Tensor]:
    def iterate(matrix: Tensor, iterations: int = 5) -> Tensor:
        a, b, c = coefficients
        tall = transpose and matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        if normalize == "frobenius":
            x = x / x.norm()
        elif normalize == "largest entry":
            x = x / x.abs().max()
        for _ in range(iterations + extra):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if tall else x

    return iterate


def _elementwise(matrix: Tensor, iterations: int = 5) -> Tensor:
    a, b, c = optimizers.NEWTON_SCHULZ_COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(iterations):
        x = a * x + b * x**3 + c * x**5
    return x


def _exact_factor(matrix: Tensor, iterations: int = 5) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


NEWTON_SCHULZ = Exercise(
    id="newton_schulz",
    title="Newton-Schulz orthogonalization",
    points=3,
    reference=optimizers.newton_schulz,
    cases=_matrix_cases,
    rtol=1e-3,
    atol=1e-4,
    mutants=[
        Mutant(
            "not normalized",
            _newton_schulz_with(normalize="none"),
            "You seem to iterate on the matrix as it is. The polynomial is made for singular values up to about 1, so "
            "divide by the Frobenius norm first.",
        ),
        Mutant(
            "normalized by the largest entry",
            _newton_schulz_with(normalize="largest entry"),
            "You seem to divide by the largest entry, which does not bound singular values. The Frobenius norm does.",
        ),
        Mutant(
            "element-wise powers",
            _elementwise,
            "You seem to take powers of the entries. The polynomial acts on singular values, through matrix products.",
        ),
        Mutant(
            "cubic",
            _newton_schulz_with(coefficients=(1.5, -0.5, 0.0)),
            "You seem to use the classical cubic iteration (1.5, -0.5). It converges, but five rounds leave small "
            "singular values small. Use the quintic's three coefficients.",
        ),
        Mutant(
            "one iteration too many",
            _newton_schulz_with(extra=1),
            "You seem to do one iteration more than `iterations` says.",
        ),
        Mutant(
            "exact factor",
            _exact_factor,
            "This is the exact factor U V^T, by SVD. Asked for is what Muon computes: the polynomial's approximation.",
        ),
    ],
    hints=(
        "x = x / x.norm(); then `iterations` times: gram = x @ x.T; x = a x + (b gram + c gram @ gram) @ x.",
    ),
)


# --- accumulation -----------------------------------------------------------------------------------------------


class _Table(nn.Module):
    """The smallest language model: logits of the next token, one row per token."""

    def __init__(self, vocab_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


def accumulate(
    model: nn.Module, loss: Callable[[nn.Module, Batch], tuple[Tensor, int]], micro_batches: list[Batch]
) -> None:
    """Leave in `.grad` the gradient of the mean loss over all targets of all micro-batches, without a joint batch."""
    results = [loss(model, batch) for batch in micro_batches]
    count = sum(n for _, n in results)
    for total, _ in results:
        (total / count).backward()


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The loss of this exercise: (sum over targets in nats, number of targets)."""
    total, count, _ = next_token_loss(model, batch)
    return total, int(count)


def _accumulation_cases(seed: int) -> list[Callable[[], Case]]:
    def build(lengths: tuple[int, ...], vocab_size: int) -> Callable[[], Case]:
        def case() -> Case:
            g = _generator(seed)
            batches = []
            for length in lengths:
                tokens = torch.randint(vocab_size, (2, 10), generator=g)
                targets = torch.randint(vocab_size, (2, 10), generator=g)
                targets[:, length:] = -100
                batches.append({"tokens": tokens, "targets": targets})
            model = _Table(vocab_size, g)
            return Case(
                (model, summed_loss, batches), name=f"micro-batches of {[2 * n for n in lengths]} targets"
            )

        return case

    return [build((9, 2), 5), build((1, 4, 10), 7)]


def _gradients(answer: Callable[..., None], case: Case) -> list[Tensor | str]:
    model = case.args[0]
    answer(*case.args)
    return [p.grad if p.grad is not None else "no gradient" for p in model.parameters()]


def _mean_of_means(model: nn.Module, loss: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        total, count = loss(model, batch)
        (total / count / len(micro_batches)).backward()


def _sum_of_means(model: nn.Module, loss: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        total, count = loss(model, batch)
        (total / count).backward()


def _plain_sum(model: nn.Module, loss: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        loss(model, batch)[0].backward()


def _only_last(model: nn.Module, loss: Any, micro_batches: list[Batch]) -> None:
    count = sum(int((batch["targets"] != -100).sum()) for batch in micro_batches)
    for batch in micro_batches:
        model.zero_grad()
        (loss(model, batch)[0] / count).backward()


def _all_positions(model: nn.Module, loss: Any, micro_batches: list[Batch]) -> None:
    positions = sum(batch["targets"].numel() for batch in micro_batches)
    for batch in micro_batches:
        (loss(model, batch)[0] / positions).backward()


ACCUMULATION = Exercise(
    id="accumulation",
    title="Gradient accumulation",
    points=3,
    reference=accumulate,
    cases=_accumulation_cases,
    run=_gradients,
    may_change_inputs=True,
    mutants=[
        Mutant(
            "mean of means",
            _mean_of_means,
            "You seem to average the micro-batches' means: tokens of a micro-batch with few targets weigh more. Divide "
            "each sum by the number of targets of the whole batch.",
        ),
        Mutant(
            "sum of means",
            _sum_of_means,
            "You seem to add up the means of the micro-batches: the gradient grows with their number.",
        ),
        Mutant(
            "sum",
            _plain_sum,
            "You seem to add up the sums without dividing by the number of targets.",
        ),
        Mutant(
            "gradient reset",
            _only_last,
            "Only the last micro-batch seems to be left in the gradient: reset it once per step, not per micro-batch.",
        ),
        Mutant(
            "all positions",
            _all_positions,
            "You seem to divide by the number of positions. Positions whose target is -100 are not counted.",
        ),
    ],
    hints=("The count of the whole batch must be known before the first backward pass.",),
)


# --- clipping ---------------------------------------------------------------------------------------------------


def clip_by_global_norm(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """Gradients scaled so that their joint norm is at most `max_norm`, and the norm before, by the loop's function."""
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = scale_and_clip(parameters, 1.0, max_norm)
    return [parameter.grad for parameter in parameters if parameter.grad is not None], norm


def _clip_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    gradients = [
        torch.randn(4, 3, generator=g),
        5 * torch.randn(7, generator=g),
        0.1 * torch.randn(2, generator=g),
    ]
    return [
        Case((gradients, 1.0), name="a norm above max_norm"),
        Case((gradients, 1000.0), name="a norm below max_norm"),
        Case(([torch.zeros(3)], 1.0), name="zero gradients"),
    ]


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))


def _clip_each(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    clipped = [gradient * min(1.0, max_norm / (float(gradient.norm()) + 1e-6)) for gradient in gradients]
    return clipped, _norm(gradients)


def _clip_always(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    norm = _norm(gradients)
    return [gradient * max_norm / (norm + 1e-6) for gradient in gradients], norm


def _clip_values(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    return [gradient.clamp(-max_norm, max_norm) for gradient in gradients], _norm(gradients)


def _clip_norm_after(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    return clipped, min(norm, max_norm)


def _clip_sum_of_norms(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    norm = sum(float(gradient.norm()) for gradient in gradients)
    return [gradient * min(1.0, max_norm / (norm + 1e-6)) for gradient in gradients], norm


CLIPPING = Exercise(
    id="clipping",
    title="Clip by global norm",
    points=2,
    reference=clip_by_global_norm,
    cases=_clip_cases,
    rtol=1e-4,
    mutants=[
        Mutant(
            "each tensor on its own",
            _clip_each,
            "You seem to clip each tensor by its own norm, which turns the direction of the whole gradient. There is "
            "one norm, over all tensors together.",
        ),
        Mutant(
            "always rescaled",
            _clip_always,
            "You seem to rescale small gradients as well: the factor is at most 1.",
        ),
        Mutant(
            "values clipped",
            _clip_values,
            "You seem to clip the entries, which turns the direction. Scale all entries by one factor.",
        ),
        Mutant(
            "norm after clipping",
            _clip_norm_after,
            "You return the norm after clipping. The norm before it is what shows a spike in the records.",
        ),
        Mutant(
            "sum of norms",
            _clip_sum_of_norms,
            "You seem to add up the tensors' norms. The squares are added, and the root taken at the end.",
        ),
    ],
    hints=(
        "norm = sqrt(sum of all squares); factor = min(1, max_norm / norm); guard the division at norm 0.",
    ),
)

EXERCISES = [FLOOR, BITS_PER_BYTE, NEXT_TOKEN_LOSS, COSINE, WSD, ADAMW, NEWTON_SCHULZ, ACCUMULATION, CLIPPING]
