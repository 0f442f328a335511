"""Intervals against closed forms, against scipy, and against the coverage they promise."""

from __future__ import annotations

import dataclasses
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from llmcourse.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    paired_bootstrap,
    seed_interval,
    wilson_interval,
)


def test_estimate_prints_value_interval_and_n() -> None:
    estimate = Estimate(0.6328, 0.5721, 0.6893, 256, "wilson")
    assert str(estimate) == f"{estimate}" == "0.63 [0.57, 0.69], n=256"
    assert f"{estimate:.1%}" == "63.3% [57.2%, 68.9%], n=256"
    assert f"{estimate:.3f}" == "0.633 [0.572, 0.689], n=256"
    assert estimate.excludes(0.7) and estimate.excludes(0.5) and not estimate.excludes(0.6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = 1.0  # type: ignore[misc]


# ---- Wilson


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(
    "successes, n", [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (160, 256), (1, 100_000)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    ours = wilson_interval(successes, n, confidence)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert ours.value == successes / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (ours.n, ours.method, ours.confidence) == (n, "wilson", confidence)


def test_wilson_without_a_success_by_hand() -> None:
    """With s = 0 the score equation p = z sqrt(p (1 - p) / n) has the roots 0 and z^2 / (n + z^2)."""
    z = stats.norm.ppf(0.975)
    assert wilson_interval(0, 20).low == 0.0
    assert wilson_interval(0, 20).high == pytest.approx(z**2 / (20 + z**2), rel=1e-12)
    assert wilson_interval(20, 20).high == 1.0
    assert wilson_interval(20, 20).low == pytest.approx(20 / (20 + z**2), rel=1e-12)


def test_wilson_ends_solve_the_score_equation() -> None:
    estimate, z = wilson_interval(37, 90), stats.norm.ppf(0.975)
    for p in (estimate.low, estimate.high):
        assert abs(37 / 90 - p) == pytest.approx(z * sqrt(p * (1 - p) / 90), rel=1e-10)


@pytest.mark.parametrize("n", [10, 50, 256])
def test_wilson_covers_as_promised(n: int) -> None:
    """Coverage at a true share p is a finite sum over the outcomes; averaged over p it is within 1 % of 95
    %."""
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    shares = np.linspace(0.02, 0.98, 193)
    inside = np.array([[not i.excludes(p) for i in intervals] for p in shares])
    coverage = (inside * stats.binom.pmf(np.arange(n + 1), n, shares[:, None])).sum(axis=1)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.83


@pytest.mark.parametrize("arguments", [(0, 0), (1, -1), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_refuses(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        wilson_interval(*arguments)


# ---- bootstrap


def test_bootstrap_of_a_mean_has_the_plug_in_width() -> None:
    """The bootstrap mean scatters with s sqrt(1 / n), s with divisor n; its ends are +- 1.96 of that."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    estimate = bootstrap_interval(values, n_resamples=20_000)
    half = stats.norm.ppf(0.975) * values.std() / sqrt(400)
    assert estimate.value == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.05 * half
    )


@pytest.mark.parametrize("statistic", [np.mean, np.median, lambda x: np.quantile(x, 0.9)])
def test_bootstrap_agrees_with_scipy(statistic) -> None:
    values = np.random.default_rng(1).exponential(size=150)
    ours = bootstrap_interval(values, statistic, n_resamples=8_000, confidence=0.9)
    theirs = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=8_000,
        confidence_level=0.9,
        method="percentile",
        vectorized=False,
        rng=7,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == float(statistic(values))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_bootstrap_options_matter() -> None:
    values = np.random.default_rng(2).normal(size=30)
    base = bootstrap_interval(values)
    assert bootstrap_interval(values) == base
    assert bootstrap_interval(list(values)) == base
    assert bootstrap_interval(values, seed=1).low != base.low
    assert bootstrap_interval(values, n_resamples=100).low != base.low
    wide = bootstrap_interval(values, confidence=0.99)
    assert wide.low < base.low and wide.high > base.high


def test_bootstrap_covers_as_promised() -> None:
    generator = np.random.default_rng(3)
    samples = generator.exponential(size=(400, 60))
    covered = np.mean(
        [not bootstrap_interval(sample, n_resamples=300, seed=1).excludes(1.0) for sample in samples]
    )
    # skewed data at n = 60: theory expects about 93 %; binomial standard error 1.2 %
    assert 0.89 < covered < 0.98


def test_pairing_removes_what_examples_share() -> None:
    generator = np.random.default_rng(4)
    difficulty = generator.normal(0, 10, 200)
    a = difficulty + 0.5 + generator.normal(0, 0.5, 200)
    b = difficulty + generator.normal(0, 0.5, 200)
    estimate = paired_bootstrap(a, b)
    assert estimate.value == pytest.approx(a.mean() - b.mean())
    assert estimate.method == "paired bootstrap" and estimate.n == 200
    assert estimate.low > 0  # seen in pairs, lost without: the two means' own intervals are +- 1.4
    assert not bootstrap_interval(a).excludes(b.mean())
    swapped = paired_bootstrap(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-estimate.high, -estimate.low))


def test_paired_options_matter() -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 25))
    base = paired_bootstrap(a, b)
    assert paired_bootstrap(a, b, seed=1).low != base.low
    assert paired_bootstrap(a, b, n_resamples=50).low != base.low
    assert paired_bootstrap(a, b, confidence=0.5).low > base.low


# ---- seeds


def test_three_seeds_by_hand() -> None:
    """Results 1, 2, 3: mean 2, s = 1, t(2 degrees) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    estimate = seed_interval([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (2, 2 - 2.484138, 2 + 2.484138), abs=1e-6
    )
    assert (estimate.n, estimate.method) == (3, "student")


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_seed_interval_agrees_with_scipy(confidence: float) -> None:
    values = np.random.default_rng(6).normal(0.4, 0.01, 5)
    ours = seed_interval(values, confidence)
    theirs = stats.t.interval(confidence, 4, loc=values.mean(), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(theirs, rel=1e-9)


def test_seed_interval_covers_as_promised_where_the_normal_one_does_not() -> None:
    runs = np.random.default_rng(7).normal(size=(4_000, 3))
    covered = np.mean([not seed_interval(run).excludes(0.0) for run in runs])
    assert covered == pytest.approx(0.95, abs=3 * sqrt(0.95 * 0.05 / 4_000))
    normal = np.abs(runs.mean(axis=1)) <= 1.96 * runs.std(axis=1, ddof=1) / sqrt(3)
    assert normal.mean() < 0.85


# ---- refusals


@pytest.mark.parametrize(
    "interval", [bootstrap_interval, seed_interval, lambda v, **k: paired_bootstrap(v, v, **k)]
)
def test_intervals_refuse_what_has_no_spread(interval) -> None:
    for values in ([], [1.0], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match="at least 2 numbers"):
            interval(values)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="all must be finite"):
            interval([1.0, bad, 2.0])
    with pytest.raises(ValueError, match="confidence=95"):
        interval([1.0, 2.0], confidence=95)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="2 scores against 3"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="n_resamples=0"):
        bootstrap_interval([1.0, 2.0], n_resamples=0)
