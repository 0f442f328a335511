"""From training runs to scaling laws: power laws, Kaplan's law, and the parametric law of Hoffmann et al. (2022).

The last is their approach 3; approaches 1 and 2 look for the best runs only and are in
`llmcourse.training.scaling_frontiers`.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token; n runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import softmax

from llmcourse.training.scaling_laws import KaplanLaw, ParametricLaw, PowerLaw

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]

HUBER_DELTA = 1e-3
"""where the Huber loss of a log residual turns from square to straight (Hoffmann et al., 2022, section 3.3)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Finished training runs as columns of equal length n.

    Raises:
        ValueError: columns of different lengths, no runs, or a number that is not positive and finite.
    """

    parameters: np.ndarray
    """(n,) N"""
    tokens: np.ndarray
    """(n,) D"""
    loss: np.ndarray
    """(n,) L at the end of the run, nats per token"""
    flops: np.ndarray | None = None
    """(n,) C, the budget that the run belongs to; `None` means 6 N D"""

    def __post_init__(self) -> None:
        if self.flops is None:
            product = 6 * np.asarray(self.parameters, float) * self.tokens
            # Nine digits, so that runs planned for one budget do not part by rounding.
            object.__setattr__(self, "flops", np.array([float(f"{value:.9g}") for value in product]))
        for name in ("parameters", "tokens", "loss", "flops"):
            column = np.asarray(getattr(self, name), float)
            object.__setattr__(self, name, column)
            if column.ndim != 1 or len(column) != len(self.loss) or not len(column):
                raise ValueError(f"{name} has shape {column.shape}: give one number for each of the runs")
            bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
            if len(bad):
                raise ValueError(f"{name}[{bad[0]}]={column[bad[0]]}: drop that run, its logarithm is needed")

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: np.ndarray) -> Runs:
        """Some of the runs, by index (repeats allowed) or boolean mask."""
        return Runs(
            parameters=self.parameters[index],
            tokens=self.tokens[index],
            loss=self.loss[index],
            flops=self.flops[index],
        )

    def budgets(self) -> np.ndarray:
        """The distinct values of C, ascending."""
        return np.unique(self.flops)


def fit_power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Least squares of ln y on ln x, both (n,).

    Raises:
        ValueError: different lengths, a number that is not positive and finite, or fewer than 2 distinct x.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x has shape {x.shape}, y {y.shape}: give two rows of one length")
    for name, values in (("x", x), ("y", y)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name}={values}: a power law needs positive, finite numbers")
    if len(np.unique(x)) < 2:
        raise ValueError(
            f"x={x}: a line needs at least 2 distinct points, so train at another budget or size"
        )
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(coefficient=math.exp(intercept), exponent=float(slope))


def fit_kaplan(runs: Runs) -> KaplanLaw:
    """Kaplan et al. (2020, eq. 1.5) by least squares of ln L; N should exclude embeddings, as theirs does.

    Raises:
        ValueError: fewer than 4 runs, or sizes or token numbers that do not vary.
    """
    _require_spread(runs, 4)
    log_N, log_D, log_L = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.loss)

    # theta = ln alpha_N, ln alpha_D, and alpha ln N_c, alpha ln D_c: the logarithms of the two terms' prefactors
    def residuals(theta: np.ndarray) -> np.ndarray:
        alpha_N, alpha_D = np.exp(theta[:2])
        size = (theta[2] - alpha_N * log_N) / alpha_D
        data = (theta[3] - alpha_D * log_D) / alpha_D
        return alpha_D * np.logaddexp(size, data) - log_L

    starts = itertools.product((0.05, 0.2, 0.6), (0.05, 0.2, 0.6))
    fits = []
    for alpha_N, alpha_D in starts:
        middle = log_L.mean() + np.array([alpha_N * log_N.mean(), alpha_D * log_D.mean()])
        start = np.concatenate([np.log([alpha_N, alpha_D]), middle])
        fits.append(least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14))
    theta = min(fits, key=lambda fit: fit.cost).x
    alpha_N, alpha_D = map(float, np.exp(theta[:2]))
    return KaplanLaw(
        N_c=math.exp(theta[2] / alpha_N),
        D_c=math.exp(theta[3] / alpha_D),
        alpha_N=alpha_N,
        alpha_D=alpha_D,
    )


def huber(residual: np.ndarray, delta: float = HUBER_DELTA) -> np.ndarray:
    """r^2 / 2 where |r| <= delta, delta (|r| - delta / 2) beyond: an outlier pulls with a constant force (Huber,
    1964)."""
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def log_loss(theta: np.ndarray, log_parameters: np.ndarray, log_tokens: np.ndarray) -> np.ndarray:
    """ln L = LSE(a - alpha ln N, b - beta ln D, e) with theta = (a, b, e, alpha, beta) = (ln A, ln B, ln E, ...).

    theta (..., 5), ln N and ln D (n,) -> (..., n). No term overflows and A, B, E cannot become negative
    (Hoffmann et al., 2022, eq. 3).
    """
    return np.logaddexp.reduce(_terms(np.asarray(theta, float), log_parameters, log_tokens), axis=-2)


def _terms(theta: np.ndarray, log_parameters: np.ndarray, log_tokens: np.ndarray) -> np.ndarray:
    """(..., 3, n) logarithms of the size term, the data term and E."""
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    size, data = a - alpha * log_parameters, b - beta * log_tokens
    return np.stack([size, data, np.broadcast_to(e, size.shape)], axis=-2)


def huber_objective(theta: np.ndarray, runs: Runs, delta: float = HUBER_DELTA) -> float:
    """Summed Huber loss of ln L - ln(measured): what approach 3 minimizes (Hoffmann et al., 2022, eq. 3)."""
    residual = log_loss(theta, np.log(runs.parameters), np.log(runs.tokens)) - np.log(runs.loss)
    return float(huber(residual, delta).sum())


@dataclass(frozen=True, kw_only=True)
class ParametricFit:
    """Approach 3: the law and how well it fits."""

    law: ParametricLaw
    objective: float
    """summed Huber loss of the log residuals at the minimum"""
    rms: float
    """root mean square of the log residuals: relative error of the loss"""
    at_floor: bool
    """whether E came out as good as 0 (below a thousandth of the least loss): the runs do not show a floor"""


def fit_parametric(
    runs: Runs, *, delta: float = HUBER_DELTA, n_polished: int = 12, start: ParametricLaw | None = None
) -> ParametricFit:
    """Approach 3: Huber loss on ln L in LSE form, a grid of starts, L-BFGS (Hoffmann et al., 2022, section 3.3).

    The objective is divided by delta^2: with its natural scale of 1e-6 L-BFGS would stop before it has converged, which
    is what Besiroglu et al. (2024) find in the original. ln A and ln B are measured at the center of the runs, where
    they are nearly independent of the exponents.

    Args:
        runs: at least 6 runs, of several sizes and several lengths.
        delta: of the Huber loss.
        n_polished: the best starts of the grid that L-BFGS runs from; the others are only evaluated.
        start: begin at this law alone instead (for resamples of runs whose law is known).

    Raises:
        ValueError: not more runs than the 5 constants, or sizes or token numbers that do not vary.
    """
    _require_spread(runs, 6)
    log_N, log_D, log_L = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.loss)
    x, y = log_N - log_N.mean(), log_D - log_D.mean()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        terms = _terms(theta, x, y)
        residual = np.logaddexp.reduce(terms, axis=0) - log_L
        force = np.clip(residual / delta, -1, 1) / delta  # derivative of huber / delta^2
        share = softmax(terms, axis=0) * force  # (3, n)
        gradient = np.array([*share.sum(axis=1), -(share[0] * x).sum(), -(share[1] * y).sum()])
        return float(huber(residual, delta).sum()) / delta**2, gradient

    if start is None:
        starts = _starts(x, y, log_L)
        scores = huber(log_loss(starts, x, y) - log_L, delta).sum(axis=1)
        starts = starts[np.argsort(scores)[:n_polished]]
    else:
        a = math.log(start.A) - start.alpha * log_N.mean()
        b = math.log(start.B) - start.beta * log_D.mean()
        e = math.log(max(start.E, 1e-6 * float(runs.loss.min())))
        starts = np.array([[a, b, e, start.alpha, start.beta]])
    theta = min((_descend(objective, one, runs) for one in starts), key=lambda t: objective(t)[0])
    a, b, e, alpha, beta = map(float, theta)
    law = ParametricLaw(
        E=math.exp(e),
        A=math.exp(a + alpha * log_N.mean()),
        B=math.exp(b + beta * log_D.mean()),
        alpha=alpha,
        beta=beta,
    )
    residual = log_loss(theta, x, y) - log_L
    return ParametricFit(
        law=law,
        objective=float(huber(residual, delta).sum()),
        rms=float(np.sqrt(np.mean(residual**2))),
        at_floor=law.E < 1e-3 * float(runs.loss.min()),
    )


def _starts(x: np.ndarray, y: np.ndarray, log_L: np.ndarray) -> np.ndarray:
    """(k, 5) a grid: exponents, the share of E in the least loss, how the rest is split at the center of the runs."""
    exponents = (0.1, 0.3, 0.5, 0.8, 1.2)
    shares, splits = (0.05, 0.3, 0.6, 0.9), (0.1, 0.3, 0.5, 0.7, 0.9)
    starts = []
    for alpha, beta, share, split in itertools.product(exponents, exponents, shares, splits):
        E = share * math.exp(log_L.min())
        rest = math.exp(log_L.mean()) - E
        starts.append([math.log(split * rest), math.log((1 - split) * rest), math.log(E), alpha, beta])
    return np.array(starts)


def _descend(objective: Objective, start: np.ndarray, runs: Runs) -> np.ndarray:
    least = math.log(float(runs.loss.min()))
    bounds = [(None, None), (None, None), (least - 14, least), (1e-3, 5.0), (1e-3, 5.0)]
    options = {"maxiter": 3000, "maxfun": 6000, "maxcor": 30, "ftol": 1e-16, "gtol": 1e-12}
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _require_spread(runs: Runs, needed: int) -> None:
    if len(runs) < needed:
        raise ValueError(f"{len(runs)} runs: this law needs at least {needed}, one more than its constants")
    for name in ("parameters", "tokens"):
        if len(np.unique(getattr(runs, name))) < 2:
            raise ValueError(f"all runs have the same {name}: vary them, or their exponent cannot be found")
