"""Bootstrap of scaling fits: designs kept, noise redrawn, coverage, failures counted, errors."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.training.scaling_bootstrap import (
    bootstrap,
    bootstrap_isoflop,
    bootstrap_parametric,
    constants,
    resample_residuals,
    resample_runs,
    resample_within_budgets,
)
from llmcourse.training.scaling_fits import Runs
from llmcourse.training.scaling_frontiers import isoflop_grid
from llmcourse.training.scaling_laws import ParametricLaw

LAW = ParametricLaw(E=0.45, A=30.0, B=300.0, alpha=0.5, beta=0.45)
GRID = isoflop_grid(LAW, [1e10, 1e11, 1e12, 1e13])


def noisy(seed: int = 0, spread: float = 0.003) -> Runs:
    noise = np.random.default_rng(seed).normal(0, spread, len(GRID))
    return Runs(
        parameters=GRID.parameters, tokens=GRID.tokens, loss=GRID.loss * np.exp(noise), flops=GRID.flops
    )


def mean_loss(runs: Runs) -> dict[str, float]:
    return {"mean": float(runs.loss.mean())}


def test_intervals_of_both_approaches_hold_the_truth():
    parametric = bootstrap_parametric(noisy(), n_resamples=60)
    assert set(parametric.values) == {"E", "A", "B", "alpha", "beta", "a", "b"}
    for name, truth in constants(LAW).items():
        interval = parametric.interval(name)
        assert interval.low < truth < interval.high and interval.n == 20, name
    isoflop = bootstrap_isoflop(noisy(1), n_resamples=60)
    interval = isoflop.interval("a")
    assert interval.low < LAW.a < interval.high and interval.high - interval.low < 0.1
    assert isoflop.n_failed == 0 and len(isoflop.samples["a"]) == 60


def test_intervals_widen_with_the_noise_and_the_confidence():
    quiet, loud = (bootstrap_isoflop(noisy(spread=s), n_resamples=60).interval("a") for s in (0.001, 0.01))
    assert loud.high - loud.low > 3 * (quiet.high - quiet.low)
    both = bootstrap_isoflop(noisy(), n_resamples=60)
    assert both.interval("a", 0.5).high < both.interval("a", 0.95).high


def test_residual_intervals_cover_about_as_often_as_they_say():
    # 60 sweeps of known noise, 80 % intervals: 48 +- 3 are expected to cover
    hits = 0
    for seed in range(60):
        interval = bootstrap_isoflop(noisy(seed), n_resamples=40, seed=seed).interval("a", 0.8)
        hits += not interval.excludes(LAW.a)
    assert 38 <= hits <= 57


def test_residuals_keep_the_design_and_the_noise():
    runs, fitted = noisy(), GRID.loss
    resample = resample_residuals(fitted, n_constants=5)
    rng = np.random.default_rng(0)
    drawn = [resample(runs, rng) for _ in range(200)]
    for name in ("parameters", "tokens", "flops"):
        np.testing.assert_array_equal(getattr(drawn[0], name), getattr(runs, name))
    spread = np.std([np.log(one.loss / fitted) for one in drawn])
    expected = np.std(np.log(runs.loss / fitted)) * np.sqrt(20 / 15)
    assert spread == pytest.approx(expected, rel=0.05)


def test_resampling_within_budgets_keeps_each_budget():
    rng = np.random.default_rng(0)
    drawn = resample_within_budgets(noisy(), rng)
    np.testing.assert_array_equal(np.sort(drawn.flops), np.sort(GRID.flops))
    everywhere = resample_runs(noisy(), rng)
    assert len(everywhere) == 20 and not np.array_equal(np.sort(everywhere.flops), np.sort(GRID.flops))


def test_resamples_without_a_fit_are_counted():
    found = bootstrap_isoflop(noisy(), n_resamples=60, resample=resample_within_budgets)
    assert 0 < found.n_failed < 60 and len(found.samples["a"]) == 60 - found.n_failed


def test_the_seed_fixes_the_draws():
    one, same, other = (
        bootstrap(noisy(), mean_loss, resample_runs, n_resamples=20, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.samples["mean"], same.samples["mean"])
    assert not np.array_equal(one.samples["mean"], other.samples["mean"])
    assert one.values["mean"] == pytest.approx(noisy().loss.mean())


def test_errors():
    found = bootstrap(noisy(), mean_loss, resample_runs, n_resamples=5)
    with pytest.raises(ValueError, match="no estimate 'E': choose one of mean"):
        found.interval("E")
    with pytest.raises(ValueError, match=r"confidence=1"):
        found.interval("mean", 1)
    with pytest.raises(ValueError, match=r"n_resamples=1"):
        bootstrap(noisy(), mean_loss, resample_runs, n_resamples=1)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3 fitted losses for 20 runs"):
        resample_residuals(GRID.loss[:3], 5)(noisy(), rng)
    with pytest.raises(ValueError, match="20 runs and 20 constants"):
        resample_residuals(GRID.loss, 20)(noisy(), rng)

    calls = []

    def only_once(runs: Runs) -> dict[str, float]:
        calls.append(runs)
        if len(calls) > 1:
            raise ValueError("no bottom")
        return {"a": 1.0}

    with pytest.raises(ValueError, match=r"none of 5 resamples could be fitted \(no bottom\)"):
        bootstrap(noisy(), only_once, resample_runs, n_resamples=5)
