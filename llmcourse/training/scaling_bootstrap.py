"""How certain a fitted scaling law is: refit it to resampled runs (Efron, 1979).

Which resampling is right depends on the design. Drawing runs with replacement (`resample_runs`) treats the sizes and
budgets as random, and needs many runs: of five sizes at a budget it often leaves fewer than the three that a parabola
needs. A planned sweep keeps its design and redraws the noise (`resample_residuals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llmcourse.evaluation.statistics import Estimate
from llmcourse.training.scaling_fits import Runs, fit_parametric
from llmcourse.training.scaling_frontiers import fit_isoflop
from llmcourse.training.scaling_laws import ParametricLaw

Resample = Callable[[Runs, np.random.Generator], Runs]
Estimator = Callable[[Runs], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """Estimates from the runs and from resamples of them."""

    values: dict[str, float]
    """from the runs themselves, by name"""
    samples: dict[str, np.ndarray]
    """(r,) from each resample that could be fitted"""
    n_runs: int
    """runs behind them"""
    n_failed: int
    """resamples that could not be fitted (too few sizes left, no bottom) and are not in `samples`"""

    def interval(self, name: str, confidence: float = 0.95) -> Estimate:
        """Percentile interval of one estimate.

        Raises:
            ValueError: an unknown name, or confidence not between 0 and 1.
        """
        if name not in self.samples:
            raise ValueError(f"no estimate {name!r}: choose one of {', '.join(self.samples)}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence}: must be between 0 and 1")
        low, high = np.quantile(self.samples[name], [(1 - confidence) / 2, (1 + confidence) / 2])
        return Estimate(self.values[name], float(low), float(high), self.n_runs, "bootstrap", confidence)


def resample_runs(runs: Runs, generator: np.random.Generator) -> Runs:
    """As many runs, drawn with replacement from all."""
    return runs.take(generator.integers(len(runs), size=len(runs)))


def resample_within_budgets(runs: Runs, generator: np.random.Generator) -> Runs:
    """As many runs of each budget, drawn with replacement from those of that budget."""
    index = [np.flatnonzero(runs.flops == budget) for budget in runs.budgets()]
    return runs.take(np.concatenate([generator.choice(rows, size=len(rows)) for rows in index]))


def resample_residuals(fitted: np.ndarray, n_constants: int) -> Resample:
    """A resampling that keeps N, D and C and puts drawn residuals on the fitted losses.

    Residuals are those of ln L, centered, and widened by sqrt(n / (n - n_constants)), because a fit with that many
    constants has bent towards the noise and left smaller residuals than there were.

    Args:
        fitted: (n,) losses of the runs under the fit, nats per token.
        n_constants: constants fitted to the runs: 5 for the parametric law, 3 for each parabola.

    Raises:
        ValueError: when drawing, if there are not more runs than constants, or `fitted` is of other runs.
    """
    fitted = np.asarray(fitted, float)

    def resample(runs: Runs, generator: np.random.Generator) -> Runs:
        if len(fitted) != len(runs):
            raise ValueError(f"{len(fitted)} fitted losses for {len(runs)} runs: give one for each")
        if len(runs) <= n_constants:
            raise ValueError(f"{len(runs)} runs and {n_constants} constants leave no residuals: add runs")
        residual = np.log(runs.loss / fitted)
        residual = (residual - residual.mean()) * np.sqrt(len(runs) / (len(runs) - n_constants))
        drawn = fitted * np.exp(generator.choice(residual, size=len(runs)))
        return Runs(parameters=runs.parameters, tokens=runs.tokens, loss=drawn, flops=runs.flops)

    return resample


def bootstrap(
    runs: Runs, estimate: Estimator, resample: Resample, *, n_resamples: int = 200, seed: int = 0
) -> Bootstrap:
    """`estimate` on the runs and on `n_resamples` resamples; a resample that cannot be fitted is counted and left out.

    Raises:
        ValueError: fewer than 2 resamples asked for, none of them could be fitted, or what `estimate(runs)` raises.
    """
    if n_resamples < 2:
        raise ValueError(f"n_resamples={n_resamples}: give at least 2, 200 for an interval")
    values = dict(estimate(runs))
    generator = np.random.default_rng(seed)
    fitted: list[Mapping[str, float]] = []
    reason = None
    for _ in range(n_resamples):
        again = resample(runs, generator)
        try:
            fitted.append(estimate(again))
        except ValueError as error:
            reason = error
    if not fitted:
        raise ValueError(f"none of {n_resamples} resamples could be fitted ({reason}): add runs")
    samples = {name: np.array([one[name] for one in fitted]) for name in values}
    failed = n_resamples - len(fitted)
    return Bootstrap(values=values, samples=samples, n_runs=len(runs), n_failed=failed)


def bootstrap_isoflop(
    runs: Runs, *, n_resamples: int = 200, seed: int = 0, resample: Resample | None = None
) -> Bootstrap:
    """Approach 2 with intervals: "a" and "b", the exponents of N_opt and D_opt.

    Redraws residuals unless `resample` says otherwise.

    Raises:
        ValueError: as in `fit_isoflop` and `bootstrap`.
    """
    if resample is None:
        fit = fit_isoflop(runs)
        resample = resample_residuals(fit.loss(runs), n_constants=3 * len(fit.parabolas))

    def estimate(some: Runs) -> dict[str, float]:
        fit = fit_isoflop(some)
        return {"a": fit.size_law.exponent, "b": fit.token_law.exponent}

    return bootstrap(runs, estimate, resample, n_resamples=n_resamples, seed=seed)


def bootstrap_parametric(
    runs: Runs, *, n_resamples: int = 200, seed: int = 0, resample: Resample | None = None
) -> Bootstrap:
    """Approach 3 with intervals: "E", "A", "B", "alpha", "beta", and the exponents "a" and "b".

    Redraws residuals unless `resample` says otherwise. Resamples are fitted from the law of all runs, which takes
    about a twentieth of a fit from the whole grid of starts.

    Raises:
        ValueError: as in `fit_parametric` and `bootstrap`.
    """
    law = fit_parametric(runs).law
    if resample is None:
        resample = resample_residuals(np.asarray(law.loss(runs.parameters, runs.tokens)), n_constants=5)

    def estimate(some: Runs) -> dict[str, float]:
        return constants(fit_parametric(some, start=law).law)

    return bootstrap(runs, estimate, resample, n_resamples=n_resamples, seed=seed)


def constants(law: ParametricLaw) -> dict[str, float]:
    """The five constants of a law and the exponents of its optimum, by name."""
    names = ("E", "A", "B", "alpha", "beta", "a", "b")
    return {name: float(getattr(law, name)) for name in names}
