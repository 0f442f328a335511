"""Exercises of chapter 05, scaling laws: compute, the width rule, parabolas, the parametric law, the best allocation.

Symbols: N parameters, D training tokens, C training FLOPs; D_0 the width that a learning rate was tuned on; n runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from llmcourse.accounting import count_parameters, forward_flops_per_token, training_flops_per_token
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.models import ModelConfig, Transformer
from llmcourse.training import scaling_fits
from llmcourse.training.isoflop import SweepSettings, plan
from llmcourse.training.scaling_frontiers import fit_parabola
from llmcourse.training.scaling_laws import Allocation, ParametricLaw
from llmcourse.training.width_scaling import parameter_groups


def _numbers(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _shape(numbers: np.random.Generator, n_layers: int) -> ModelConfig:
    """A model no two sizes of which are equal."""
    kv_heads, d_head = int(numbers.integers(1, 3)), 2 * int(numbers.integers(3, 6))
    return ModelConfig(
        vocab_size=int(numbers.integers(300, 700)),
        context_length=int(numbers.integers(50, 120)),
        d_model=int(numbers.integers(30, 60)),
        n_layers=n_layers,
        n_heads=3 * kv_heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_ff=int(numbers.integers(90, 160)),
    )


# --- training FLOPs ---------------------------------------------------------------------------------------------


def training_flops(config: ModelConfig, tokens: int) -> float:
    """Training FLOPs of a run, counted product by product (`accounting.training_flops_per_token`)."""
    return training_flops_per_token(config) * tokens


def _flops_cases(seed: int) -> list[tuple[ModelConfig, int]]:
    numbers = _numbers(seed)
    return [(_shape(numbers, layers), int(numbers.integers(10_000, 90_000))) for layers in (1, 3)]


def _attention_share(config: ModelConfig, visible: float) -> float:
    """FLOPs per token of the attention products in training, with that many visible positions."""
    return 3 * config.n_layers * 4 * config.n_heads * config.d_head * visible


FLOPS = Exercise(
    id="training_flops",
    title="Training FLOPs",
    points=2,
    reference=training_flops,
    cases=_flops_cases,
    rtol=1e-9,
    mutants=[
        Mutant(
            "forward only",
            lambda config, tokens: forward_flops_per_token(config) * tokens,
            "This is the forward pass alone. The backward pass multiplies twice for each product of the forward pass.",
        ),
        Mutant(
            "6 N D",
            lambda config, tokens: 6 * count_parameters(config) * tokens,
            "This is 6 N D with all parameters. It leaves out the attention products, and counts gains as matrices.",
        ),
        Mutant(
            "6 N D without embeddings",
            lambda config, tokens: 6 * count_parameters(config, embeddings=False) * tokens,
            "This is 6 N D without embeddings. The look-up is free, but the output head is a matrix product, here a "
            "large one.",
        ),
        Mutant(
            "no attention products",
            lambda config, tokens: (
                (training_flops_per_token(config) - _attention_share(config, (config.context_length + 1) / 2))
                * tokens
            ),  # fmt: skip
            "You seem to count matrices only. Scores and weighted values are products as well: 4 H C for each visible "
            "position, in each layer.",
        ),
        Mutant(
            "no causal mask",
            lambda config, tokens: (
                (training_flops_per_token(config) + _attention_share(config, (config.context_length - 1) / 2))
                * tokens
            ),  # fmt: skip
            "You seem to let every position see all others. Under the causal mask a position sees (T + 1) / 2 on "
            "average.",
        ),
    ],
    hints=(
        "Per token and forward: 2 per weight of every matrix (head included), 4 H C (T + 1) / 2 a layer.",
    ),
)


# --- tokens for a budget ----------------------------------------------------------------------------------------


def tokens_for_budget(flops: float, config: ModelConfig, batch_size: int) -> tuple[int, int]:
    """(steps, training tokens) that come nearest to a budget, by the sweep's own `plan`."""
    run = plan([flops], [config], SweepSettings(batch_size=batch_size, min_steps=1))[0]
    return run.steps, run.tokens


def _budget_cases(seed: int) -> list[tuple[float, ModelConfig, int]]:
    numbers, cases = _numbers(seed), []
    for layers, share in ((2, 0.81), (1, 0.27)):
        config, batch_size = _shape(numbers, layers), int(numbers.integers(5, 11))
        per_step = training_flops_per_token(config) * batch_size * config.context_length
        cases.append(((int(numbers.integers(40, 90)) + share) * per_step, config, batch_size))
    return cases


def _steps_with(
    *,
    per_token: Callable[[ModelConfig], float] = training_flops_per_token,
    rounding: Callable[..., int] = round,
) -> Callable[..., tuple[int, int]]:
    def steps_for(flops: float, config: ModelConfig, batch_size: int) -> tuple[int, int]:
        batch = batch_size * config.context_length
        steps = rounding(flops / per_token(config) / batch)
        return steps, steps * batch

    return steps_for


def _rows_forgotten(flops: float, config: ModelConfig, batch_size: int) -> tuple[int, int]:
    steps = round(flops / training_flops_per_token(config) / config.context_length)
    return steps, steps * config.context_length


def _tokens_not_whole(flops: float, config: ModelConfig, batch_size: int) -> tuple[int, int]:
    steps, _ = tokens_for_budget(flops, config, batch_size)
    return steps, round(flops / training_flops_per_token(config))


BUDGET = Exercise(
    id="tokens_for_budget",
    title="Tokens for a budget",
    points=2,
    reference=tokens_for_budget,
    cases=_budget_cases,
    mutants=[
        Mutant(
            "forward FLOPs",
            _steps_with(per_token=forward_flops_per_token),
            "You seem to divide by the FLOPs of the forward pass. Training costs three times as much a token.",
        ),
        Mutant(
            "6 N",
            _steps_with(per_token=lambda config: 6 * count_parameters(config)),
            "You seem to divide by 6 N. Use the exact count of the exercise before.",
        ),
        Mutant(
            "rounded down",
            _steps_with(rounding=math.floor),
            "You seem to round the steps down. The nearest number of steps keeps all runs within half a step of the "
            "budget.",
        ),
        Mutant(
            "rows forgotten",
            _rows_forgotten,
            "You seem to count one row a step. A step has batch_size rows of context_length tokens.",
        ),
        Mutant(
            "not whole steps",
            _tokens_not_whole,
            "Your tokens are no whole number of steps: the run sees steps * batch_size * context_length of them.",
        ),
    ],
    hints=("steps = round(budget / FLOPs per token / tokens per step).",),
)


# --- the width rule ---------------------------------------------------------------------------------------------


def width_rule(
    d_model: int, base_width: int, lr: float, weight_decay: float
) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of hidden matrices, embeddings and gains, read from the package's groups.

    `lr` and `weight_decay` are those of a model of width `base_width`.
    """
    config = ModelConfig(
        vocab_size=3, context_length=2, d_model=d_model, n_layers=1, n_heads=1, n_kv_heads=1, d_head=2, d_ff=2
    )
    with torch.random.fork_rng(devices=[]):
        groups = parameter_groups(Transformer(config), base_width, "mup", weight_decay=weight_decay)
    rates = [(lr * group["lr_scale"], group["weight_decay"]) for group in groups]
    return dict(zip(("hidden", "embedding", "gain"), rates, strict=True))


def _width_cases(seed: int) -> list[tuple[int, int, float, float]]:
    numbers = _numbers(seed)
    rates = [(float(numbers.uniform(0.002, 0.03)), float(numbers.uniform(0.02, 0.2))) for _ in range(3)]
    return [(96, 32, *rates[0]), (16, 40, *rates[1]), (28, 28, *rates[2])]


def _width_with(
    *,
    power: float = 1.0,
    embedding: float = 0.0,
    gain: float = 0.0,
    decay: float = 1.0,
    gain_decay: bool = False,
) -> Callable[..., dict[str, tuple[float, float]]]:
    def rule(d_model: int, base_width: int, lr: float, weight_decay: float) -> dict[str, tuple[float, float]]:
        m = d_model / base_width
        return {
            "hidden": (lr / m**power, weight_decay * m**decay),
            "embedding": (lr / m**embedding, weight_decay),
            "gain": (lr / m**gain, weight_decay if gain_decay else 0.0),
        }

    return rule


WIDTH = Exercise(
    id="width_rule",
    title="Learning rates for a width",
    points=2,
    reference=width_rule,
    cases=_width_cases,
    rtol=1e-9,
    mutants=[
        Mutant(
            "all groups divided",
            _width_with(embedding=1.0, gain=1.0),
            "You seem to divide every rate by m. Only outputs of hidden matrices sum over the width; embeddings and "
            "gains keep their rate.",
        ),
        Mutant(
            "embeddings divided",
            _width_with(embedding=1.0),
            "You seem to treat embeddings as hidden matrices. A token's embedding is looked up, nothing is summed.",
        ),
        Mutant(
            "square root",
            _width_with(power=0.5),
            "You seem to divide by sqrt(m). Random terms would add up like that; AdamW's updates are aligned with "
            "their inputs and add up in full.",
        ),
        Mutant(
            "multiplied",
            _width_with(power=-1.0),
            "You seem to multiply by m. A wider matrix moves its outputs further at the same rate, so its rate falls.",
        ),
        Mutant(
            "decay not adjusted",
            _width_with(decay=0.0),
            "Your rates are right, but hidden weights now shrink by lr * decay / m a step. Multiply their decay by m.",
        ),
        Mutant(
            "gains decay",
            _width_with(gain_decay=True),
            "Your gains have weight decay. It would pull every normalization towards zero; they get none.",
        ),
    ],
    hints=("m = d_model / base_width; hidden: (lr / m, weight_decay * m).",),
)


# --- the parabola of approach 2 ---------------------------------------------------------------------------------


def parabola_bottom(parameters: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """(N, loss) at the bottom of the least-squares parabola of the loss in ln N, by the package's `fit_parabola`."""
    fitted = fit_parabola(parameters, 1e9 / np.asarray(parameters), losses, 6e9)
    return fitted.parameters, fitted.loss


def _parabola_cases(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    numbers, cases = _numbers(seed), []
    for n, noise in ((5, 0.004), (7, 0.01), (4, 0.0)):
        log_N = np.sort(np.log(2e4) + np.linspace(-1.3, 1.1, n) + numbers.uniform(-0.1, 0.1, n))
        bottom = np.log(2e4) + numbers.uniform(-0.25, 0.25)
        losses = 1.4 + 0.2 * (log_N - bottom) ** 2 + 0.02 * (log_N - bottom) ** 3
        cases.append((np.exp(log_N), losses + noise * numbers.standard_normal(n)))
    return cases


def _bottom_with(
    *, factor: float = -0.5, logarithm: bool = True, exponential: bool = True, of_log_loss: bool = False
) -> Callable[..., tuple[float, float]]:
    def bottom(parameters: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
        x = np.log(parameters) if logarithm else parameters / 1e4
        a, b, c = np.polyfit(x, np.log(losses) if of_log_loss else losses, 2)
        best = factor * b / a
        height = float(a * best * best + b * best + c)
        back = (math.exp(best) if exponential else float(best)) if logarithm else float(best * 1e4)
        return back, math.exp(height) if of_log_loss else height

    return bottom


def _best_run(parameters: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    return float(parameters[losses.argmin()]), float(losses.min())


def _best_loss_of_runs(parameters: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    return parabola_bottom(parameters, losses)[0], float(losses.min())


PARABOLA = Exercise(
    id="parabola",
    title="Bottom of an IsoFLOP parabola",
    points=2,
    reference=parabola_bottom,
    cases=_parabola_cases,
    rtol=1e-6,
    mutants=[
        Mutant(
            "parabola in N",
            _bottom_with(logarithm=False),
            "You seem to fit a parabola in N. Sizes differ by factors, so the curve is a parabola in ln N.",
        ),
        Mutant(
            "logarithm of N",
            _bottom_with(exponential=False),
            "You return ln N at the bottom. Take the exponential.",
        ),
        Mutant(
            "a factor of 2",
            _bottom_with(factor=-0.25),
            "Your bottom lies at -b / (4 a). The derivative 2 a x + b is zero at -b / (2 a).",
        ),
        Mutant(
            "best run",
            _best_run,
            "You return the best of the runs. The bottom lies between runs, and one run's noise should not decide it.",
        ),
        Mutant(
            "loss of the best run",
            _best_loss_of_runs,
            "Your N is right; as the loss you return that of the best run. Evaluate the parabola at its bottom.",
        ),
        Mutant(
            "parabola of the log loss",
            _bottom_with(of_log_loss=True),
            "You seem to take the logarithm of the loss as well. Approach 2 fits the loss itself.",
        ),
    ],
    hints=("np.polyfit(np.log(parameters), losses, 2) gives a, b, c; the bottom is at ln N = -b / (2 a).",),
)


# --- the parametric law as a log-sum-exp ------------------------------------------------------------------------


def _law_cases(seed: int) -> list[Case]:
    numbers = _numbers(seed)
    log_N, log_D = numbers.uniform(8, 14, 6), numbers.uniform(10, 18, 6)
    theta = np.array([6.0, 6.4, 0.5, 0.34, 0.28]) + numbers.uniform(-0.1, 0.1, 5)
    far = np.array([980.0, 990.0, 0.3, 1.1, 0.7]) + numbers.uniform(-0.1, 0.1, 5)
    return [
        Case((theta, log_N, log_D)),
        Case((far, log_N, log_D), name="constants as an optimizer may try them"),
    ]


def _law_with(
    *,
    sign: float = -1.0,
    swapped: bool = False,
    raw_floor: bool = False,
    combine: str = "stable",
    log: bool = True,
) -> Callable[..., np.ndarray]:
    def law(theta: np.ndarray, log_parameters: np.ndarray, log_tokens: np.ndarray) -> np.ndarray:
        a, b, e, alpha, beta = theta
        if swapped:
            alpha, beta = beta, alpha
        floor = np.log(e) if raw_floor else e
        terms = [
            a + sign * alpha * log_parameters,
            b + sign * beta * log_tokens,
            np.full(len(log_tokens), floor),
        ]
        if combine == "max":
            return np.maximum.reduce(terms)
        if combine == "naive":
            with np.errstate(all="ignore"):
                return np.log(sum(np.exp(term) for term in terms))
        total = np.logaddexp.reduce(terms)
        with np.errstate(all="ignore"):
            return total if log else np.exp(total)

    return law


LOG_LOSS = Exercise(
    id="log_loss",
    title="The law as a log-sum-exp",
    points=2,
    reference=scaling_fits.log_loss,
    cases=_law_cases,
    rtol=1e-9,
    mutants=[
        Mutant(
            "overflow",
            _law_with(combine="naive"),
            "Your formula is right and overflows: exp of some hundreds is infinite, and an optimizer does get there. "
            "Use np.logaddexp, or subtract the largest term first.",
        ),
        Mutant(
            "loss",
            _law_with(log=False),
            "You return L. The fit compares ln L.",
        ),
        Mutant(
            "sign of the exponents",
            _law_with(sign=1.0),
            "Your terms grow with N and D. A / N^alpha is exp(a - alpha ln N).",
        ),
        Mutant(
            "exponents swapped",
            _law_with(swapped=True),
            "You seem to give N the exponent beta. The order is theta = (a, b, e, alpha, beta).",
        ),
        Mutant(
            "E instead of ln E",
            _law_with(raw_floor=True),
            "You seem to take e for E itself. All three constants are logarithms: E = exp(e).",
        ),
        Mutant(
            "largest term only",
            _law_with(combine="max"),
            "You seem to take the largest of the three terms. They are added, under the logarithm.",
        ),
    ],
    hints=("Three terms: a - alpha ln N, b - beta ln D, e; then np.logaddexp of all three.",),
)


# --- Huber loss -------------------------------------------------------------------------------------------------


def _residual_cases(seed: int) -> list[tuple[np.ndarray, float]]:
    numbers = _numbers(seed)
    small, large = 0.01 * numbers.standard_normal(9), 3 * numbers.standard_normal(7)
    return [(small, 0.005), (np.concatenate([large, [0.0, 0.7, -0.7]]), 0.7)]


def _huber_with(
    *, half: float = 0.5, offset: bool = True, slope: bool = True, absolute: bool = True, cut: bool = True
) -> Callable[[np.ndarray, float], np.ndarray]:
    def loss(residual: np.ndarray, delta: float) -> np.ndarray:
        size = np.abs(residual) if absolute else residual
        straight = (delta if slope else 1.0) * (size - (delta / 2 if offset else 0.0))
        return np.where(size <= delta, half * residual**2, straight) if cut else half * residual**2

    return loss


HUBER = Exercise(
    id="huber",
    title="Huber loss",
    points=1,
    reference=scaling_fits.huber,
    cases=_residual_cases,
    rtol=1e-9,
    atol=1e-12,
    mutants=[
        Mutant(
            "squares only",
            _huber_with(cut=False),
            "You seem to square every residual: one failed run would then pull as hard as it is far off.",
        ),
        Mutant(
            "no half",
            _huber_with(half=1.0),
            "Your square part lacks the factor 1/2, so the slope jumps at delta.",
        ),
        Mutant(
            "jump at delta",
            _huber_with(offset=False),
            "Your straight part is delta |r|. It must meet the parabola at delta: delta (|r| - delta / 2).",
        ),
        Mutant(
            "slope one",
            _huber_with(slope=False),
            "Your straight part has slope 1. The parabola arrives at |r| = delta with slope delta.",
        ),
        Mutant(
            "sign",
            _huber_with(absolute=False),
            "You seem to compare r with delta and not |r|: large negative residuals are squared.",
        ),
    ],
    hints=("np.where(|r| <= delta, r**2 / 2, delta * (|r| - delta / 2)).",),
)


# --- the best allocation ----------------------------------------------------------------------------------------


def best_allocation(
    flops: float, E: float, A: float, B: float, alpha: float, beta: float
) -> tuple[float, float]:
    """(N, D) with the least loss for C = 6 N D under the law, by the package's closed form."""
    best = ParametricLaw(E=E, A=A, B=B, alpha=alpha, beta=beta).optimal(flops)
    return best.parameters, best.tokens


def _law(numbers: np.random.Generator) -> dict[str, float]:
    return {
        "E": float(numbers.uniform(0.4, 1.9)),
        "A": float(numbers.uniform(200, 600)),
        "B": float(numbers.uniform(900, 2500)),
        "alpha": float(numbers.uniform(0.3, 0.36)),
        "beta": float(numbers.uniform(0.4, 0.5)),
    }


def _allocation_cases(seed: int) -> list[Case]:
    numbers = _numbers(seed)
    return [Case((flops,), _law(numbers)) for flops in (1e18, 5.76e23)]


def _allocation_with(
    *, product: float = 6.0, swapped: bool = False, inverted: bool = False, exponents: bool = True
) -> Callable[..., tuple[float, float]]:
    def allocate(
        flops: float, E: float, A: float, B: float, alpha: float, beta: float
    ) -> tuple[float, float]:
        ratio = (alpha * A) / (beta * B) if exponents else A / B
        G = ratio ** ((-1 if inverted else 1) / (alpha + beta))
        a, b = beta / (alpha + beta), alpha / (alpha + beta)
        a, b = (b, a) if swapped else (a, b)
        return G * (flops / product) ** a, (flops / product) ** b / G

    return allocate


def _twenty(flops: float, E: float, A: float, B: float, alpha: float, beta: float) -> tuple[float, float]:
    size = math.sqrt(flops / 120)
    return size, 20 * size


ALLOCATION = Exercise(
    id="best_allocation",
    title="Best size and tokens for a budget",
    points=3,
    reference=best_allocation,
    cases=_allocation_cases,
    rtol=1e-9,
    mutants=[
        Mutant(
            "6 forgotten",
            _allocation_with(product=1.0),
            "You seem to take C = N D. A token costs 6 FLOPs a parameter, so N D = C / 6.",
        ),
        Mutant(
            "exponents swapped",
            _allocation_with(swapped=True),
            "Your exponents are swapped. The faster the data term falls (large beta), the more goes into size: "
            "N ~ C^(beta / (alpha + beta)).",
        ),
        Mutant(
            "G inverted",
            _allocation_with(inverted=True),
            "Your prefactor seems to be inverted. A large size term (A) asks for a large model.",
        ),
        Mutant(
            "terms set equal",
            _allocation_with(exponents=False),
            "You seem to set the two terms equal. At the optimum their derivatives along the budget are: "
            "alpha A N^-alpha = beta B D^-beta.",
        ),
        Mutant(
            "20 tokens a parameter",
            _twenty,
            "This is the rule of 20 tokens a parameter. It is one law's optimum at one budget; solve for the given "
            "law.",
        ),
    ],
    hints=("Put D = C / (6 N) into the law and set the derivative with respect to ln N to zero.",),
)


# --- the cost of a model over its life --------------------------------------------------------------------------


def lifetime_flops(
    parameters: float,
    loss: float,
    inference_tokens: float,
    E: float,
    A: float,
    B: float,
    alpha: float,
    beta: float,
) -> float:
    """Training and inference FLOPs of a model of that size that is trained down to `loss`, by the package's classes."""
    law = ParametricLaw(E=E, A=A, B=B, alpha=alpha, beta=beta)
    tokens = law.tokens_for(loss, parameters)
    return Allocation(parameters=parameters, tokens=tokens, inference_tokens=inference_tokens).total_flops


def _lifetime_cases(seed: int) -> list[Case]:
    numbers, cases = _numbers(seed), []
    for size, inference in ((3e9, 2e12), (4e10, 7e11)):
        law = _law(numbers)
        loss = law["E"] + 1.6 * law["A"] * size ** -law["alpha"]
        cases.append(Case((size, loss, inference), law))
    return cases


def _lifetime_with(
    *,
    training: float = 6.0,
    inference: float = 2.0,
    floor: bool = True,
    inverse: bool = True,
    size: bool = True,
) -> Callable[..., float]:
    def cost(
        parameters: float,
        loss: float,
        inference_tokens: float,
        E: float,
        A: float,
        B: float,
        alpha: float,
        beta: float,
    ) -> float:
        left = loss - (E if floor else 0.0) - (A * parameters**-alpha if size else 0.0)
        tokens = (B / left) ** (1 / beta if inverse else beta)
        return training * parameters * tokens + inference * parameters * inference_tokens

    return cost


LIFETIME = Exercise(
    id="lifetime_flops",
    title="Training and inference together",
    points=2,
    reference=lifetime_flops,
    cases=_lifetime_cases,
    rtol=1e-8,
    mutants=[
        Mutant(
            "training only",
            _lifetime_with(inference=0.0),
            "You seem to count training only. Each token that the model processes later costs 2 N.",
        ),
        Mutant(
            "inference as training",
            _lifetime_with(inference=6.0),
            "You seem to charge 6 N for a token of inference. There is no backward pass: 2 N.",
        ),
        Mutant(
            "E forgotten",
            _lifetime_with(floor=False),
            "You seem to leave out E when you solve for D. Only what is above E can be bought with data.",
        ),
        Mutant(
            "size term forgotten",
            _lifetime_with(size=False),
            "You seem to leave out A / N^alpha when you solve for D. A small model has less left to gain from data.",
        ),
        Mutant(
            "exponent not inverted",
            _lifetime_with(inverse=False),
            "You seem to raise to beta. B / D^beta = x gives D = (B / x)^(1 / beta).",
        ),
    ],
    hints=("D = (B / (loss - E - A / N^alpha))^(1 / beta); then 6 N D + 2 N D_inference.",),
)

EXERCISES = [FLOPS, BUDGET, WIDTH, PARABOLA, LOG_LOSS, HUBER, ALLOCATION, LIFETIME]
