"""The best runs of each amount of compute: approaches 1 and 2 of Hoffmann et al. (2022), and what biases the second.

1. the envelope of training curves: which size has the least loss at each amount of compute;
2. IsoFLOP parabolas: the size at the bottom of a parabola in ln N through the runs of one budget.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token; s points of a curve, m of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmcourse.training.scaling_fits import Runs, fit_power_law
from llmcourse.training.scaling_laws import ParametricLaw, PowerLaw

# Approach 1


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCurve:
    """Loss of one model along its training.

    Raises:
        ValueError: columns of different lengths, fewer than 2 points, or FLOPs that do not increase.
    """

    parameters: float
    """N"""
    flops: np.ndarray
    """(s,) training FLOPs spent so far, increasing"""
    tokens: np.ndarray
    """(s,) training tokens seen so far"""
    loss: np.ndarray
    """(s,) loss there, nats per token; smooth it first if it is the loss of single batches"""

    def __post_init__(self) -> None:
        for name in ("flops", "tokens", "loss"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float))
        if not len(self.flops) == len(self.tokens) == len(self.loss) >= 2:
            raise ValueError(f"a curve of {len(self.flops)} points: give columns of one length, at least 2")
        if (np.diff(self.flops) <= 0).any():
            raise ValueError("flops must increase along a training curve")


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """The best run at each amount of compute, and power laws through them."""

    flops: np.ndarray
    """(m,) C"""
    parameters: np.ndarray
    """(m,) N of the curve that is lowest there"""
    tokens: np.ndarray
    """(m,) tokens it had seen"""
    loss: np.ndarray
    """(m,) its loss"""
    at_edge: np.ndarray
    """(m,) bool: the winner is the smallest or largest size that reaches this C, so a better one may lie outside"""
    size_law: PowerLaw
    """N_opt(C), fitted to the points inside"""
    token_law: PowerLaw
    """D_opt(C), fitted to the points inside"""


def fit_envelope(curves: Sequence[TrainingCurve], n_points: int = 1500) -> Frontier:
    """Approach 1: at `n_points` values of C, even in ln C, the curve with the least loss (interpolated in ln C).

    Values of C that fewer than 3 sizes reach are left out. Points of a curve before its end come from a learning rate
    that has not decayed yet, which favors runs that end there (Hoffmann et al., 2022, section 3.1): give runs of
    several lengths for each size, or a schedule that does not decay.

    Raises:
        ValueError: fewer than 3 sizes (in all, or at every C), or no size between two others wins at 2 values of C.
    """
    size = np.array([curve.parameters for curve in curves], float)
    if len(np.unique(size)) < 3:
        raise ValueError(f"{len(np.unique(size))} sizes: an envelope with an inside needs at least 3")
    first, last = min(curve.flops[0] for curve in curves), max(curve.flops[-1] for curve in curves)
    grid = np.linspace(math.log(first), math.log(last), n_points)
    losses = _at(curves, grid, [curve.loss for curve in curves])  # (curves, m)
    tokens = _at(curves, grid, [curve.tokens for curve in curves])
    keep = [len(np.unique(size[reached])) >= 3 for reached in np.isfinite(losses).T]
    grid, losses, tokens = grid[keep], losses[:, keep], tokens[:, keep]
    if not len(grid):
        raise ValueError("no amount of compute is reached by 3 sizes: lengthen the runs of the larger models")
    best, column = np.nanargmin(losses, axis=0), np.arange(len(grid))
    reached = np.where(np.isfinite(losses), size[:, None], np.nan)
    smallest, largest = np.nanmin(reached, axis=0), np.nanmax(reached, axis=0)
    at_edge = (size[best] == smallest) | (size[best] == largest)
    inside = ~at_edge
    if inside.sum() < 2:
        raise ValueError(
            "the best size is the smallest or the largest one everywhere: add sizes or lengthen the runs"
        )
    flops, tokens = np.exp(grid), tokens[best, column]
    return Frontier(
        flops=flops,
        parameters=size[best],
        tokens=tokens,
        loss=losses[best, column],
        at_edge=at_edge,
        size_law=fit_power_law(flops[inside], size[best][inside]),
        token_law=fit_power_law(flops[inside], tokens[inside]),
    )


def _at(curves: Sequence[TrainingCurve], log_flops: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """(curves, m) values of each curve at other FLOPs; NaN before its first and after its last point."""
    return np.array(
        [
            np.interp(log_flops, np.log(curve.flops), own, left=np.nan, right=np.nan)
            for curve, own in zip(curves, values, strict=True)
        ]
    )


# Approach 2


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """L = loss + curvature (ln N - ln parameters)^2 through the runs of one budget."""

    flops: float
    """C"""
    parameters: float
    """N at the bottom"""
    tokens: float
    """D at the bottom"""
    loss: float
    """L at the bottom"""
    curvature: float
    """half the second derivative of L along ln N, positive"""
    inside: bool
    """whether the bottom lies between the smallest and the largest size trained; otherwise it is extrapolated"""

    def __call__(self, parameters: float | np.ndarray) -> float | np.ndarray:
        """L on the parabola."""
        return self.loss + self.curvature * np.log(np.asarray(parameters, float) / self.parameters) ** 2


@dataclass(frozen=True, kw_only=True)
class IsoFlopFit:
    """Approach 2: one parabola a budget, and power laws through their bottoms."""

    parabolas: tuple[Parabola, ...]
    """by ascending budget"""
    size_law: PowerLaw
    """N_opt(C)"""
    token_law: PowerLaw
    """D_opt(C)"""

    @property
    def extrapolated(self) -> tuple[float, ...]:
        """Budgets whose bottom lies outside the sizes trained."""
        return tuple(p.flops for p in self.parabolas if not p.inside)

    def loss(self, runs: Runs) -> np.ndarray:
        """(n,) the parabolas' losses for the runs, nats per token."""
        by_budget = {p.flops: p for p in self.parabolas}
        return np.array([by_budget[c](n) for c, n in zip(runs.flops, runs.parameters, strict=True)])


def fit_parabola(parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: float) -> Parabola:
    """Least-squares parabola of L in ln N through the runs of one budget, all (k,), and its bottom.

    The bottom's D is read from a line of ln D in ln N through the same runs, which is exact for C = 6 N D and close
    when the FLOPs are counted in full.

    Raises:
        ValueError: fewer than 3 distinct sizes, or a parabola that opens downwards and has no bottom.
    """
    log_N = np.log(np.asarray(parameters, float))
    if len(np.unique(log_N)) < 3:
        raise ValueError(f"{len(np.unique(log_N))} sizes at {flops:.3g} FLOPs: a parabola needs at least 3")
    center = log_N.mean()
    a, b, c = np.polyfit(log_N - center, np.asarray(loss, float), 2)
    if not a > 0:
        raise ValueError(
            f"the losses at {flops:.3g} FLOPs bend downwards (curvature {a:.2g}): there is no best size between "
            "these, so widen the range of sizes or train more evenly"
        )
    bottom = center - b / (2 * a)
    line = np.polyfit(log_N - center, np.log(np.asarray(tokens, float)), 1)
    return Parabola(
        flops=float(flops),
        parameters=math.exp(bottom),
        tokens=math.exp(np.polyval(line, bottom - center)),
        loss=float(c - b * b / (4 * a)),
        curvature=float(a),
        inside=bool(log_N.min() <= bottom <= log_N.max()),
    )


def fit_isoflop(runs: Runs) -> IsoFlopFit:
    """Approach 2 (Hoffmann et al., 2022, section 3.2): a parabola for each budget in `runs.flops`, then power laws.

    Raises:
        ValueError: one budget only, or as in `fit_parabola`.
    """
    budgets = runs.budgets()
    if len(budgets) < 2:
        raise ValueError(f"one budget, {budgets[0]:.3g} FLOPs: exponents need at least 2 budgets")
    parabolas = []
    for budget in budgets:
        some = runs.take(runs.flops == budget)
        parabolas.append(fit_parabola(some.parameters, some.tokens, some.loss, budget))
    return IsoFlopFit(
        parabolas=tuple(parabolas),
        size_law=fit_power_law(budgets, np.array([p.parameters for p in parabolas])),
        token_law=fit_power_law(budgets, np.array([p.tokens for p in parabolas])),
    )


# What approach 2 gets wrong without any noise


@dataclass(frozen=True, kw_only=True)
class IsoFlopBias:
    """Approach 2 applied to losses that follow a law exactly."""

    true_exponent: float
    """a of the law, N_opt ~ C^a"""
    fitted_exponent: float
    """a from the parabolas"""
    size_ratios: tuple[float, ...]
    """N at the bottom of each parabola over the law's N_opt, by ascending budget"""


def isoflop_grid(
    law: ParametricLaw,
    budgets: Sequence[float],
    *,
    span: float = 4.0,
    n_sizes: int = 5,
    offset: float = 1.0,
    drift: float = 0.0,
) -> Runs:
    """Noise-free runs of a law on a grid of sizes around offset (C / C_0)^drift N_opt(C), with C = 6 N D.

    Args:
        law: gives the losses.
        budgets: C; the first is C_0.
        span: the largest size is span times the center, the smallest 1 / span of it.
        n_sizes: sizes a budget, evenly spaced in ln N.
        offset: center of the first grid over the true optimum; 1 is a grid centered on it.
        drift: how fast the center leaves the optimum as C grows; -law.a keeps the same sizes for all budgets.

    Raises:
        ValueError: no budgets, or a span, offset or number of sizes that gives no grid.
    """
    if not len(budgets) or n_sizes < 1 or not span > 1 or not offset > 0:
        raise ValueError(
            f"{len(budgets)} budgets, n_sizes={n_sizes}, span={span}, offset={offset}: give budgets, sizes, "
            "a span above 1 and a positive offset"
        )
    columns: list[tuple[float, float, float]] = []
    for budget in budgets:
        center = law.optimal(budget).parameters * offset * (budget / budgets[0]) ** drift
        for step in np.linspace(-1, 1, n_sizes):
            size = center * span**step
            columns.append((size, budget / (6 * size), budget))
    parameters, tokens, flops = np.array(columns).T
    return Runs(parameters=parameters, tokens=tokens, loss=law.loss(parameters, tokens), flops=flops)


def isoflop_bias(law: ParametricLaw, budgets: Sequence[float], **grid: float) -> IsoFlopBias:
    """Approach 2 on `isoflop_grid(law, budgets, **grid)`: its error when nothing is noisy.

    At N = u N_opt a run of budget C = 6 N D has the reducible loss A N_opt^-alpha [u^-alpha + (alpha / beta) u^beta]:
    one shape for all budgets, which is a parabola in ln u only near its bottom and symmetric only if alpha = beta. So
    a grid that sits at the same u for every budget puts every bottom off by one and the same factor: N_opt is biased,
    the exponent is not. A grid that drifts against the optimum biases the exponent too, even if alpha = beta.

    Raises:
        ValueError: as in `isoflop_grid` and `fit_isoflop`.
    """
    fit = fit_isoflop(isoflop_grid(law, budgets, **grid))
    ratios = tuple(p.parameters / law.optimal(p.flops).parameters for p in fit.parabolas)
    return IsoFlopBias(true_exponent=law.a, fitted_exponent=fit.size_law.exponent, size_ratios=ratios)
