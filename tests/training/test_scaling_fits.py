"""Approach 3, power laws and Kaplan's law: recovery without noise, agreement with scipy, gradients, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from llmcourse.training.scaling_fits import (
    Runs,
    fit_kaplan,
    fit_parametric,
    fit_power_law,
    huber,
    huber_objective,
    log_loss,
)
from llmcourse.training.scaling_frontiers import isoflop_grid
from llmcourse.training.scaling_laws import BESIROGLU_2024, HOFFMANN_2022, KAPLAN_2020, ParametricLaw

TINY = ParametricLaw(E=0.45, A=30.0, B=300.0, alpha=0.5, beta=0.45)
NAMES = ("E", "A", "B", "alpha", "beta")


def noisy(runs: Runs, spread: float, seed: int = 0) -> Runs:
    noise = np.random.default_rng(seed).normal(0, spread, len(runs))
    return Runs(parameters=runs.parameters, tokens=runs.tokens, loss=runs.loss * np.exp(noise))


@pytest.mark.parametrize(
    ("law", "first"),
    [(HOFFMANN_2022, 1e18), (BESIROGLU_2024, 1e18), (BESIROGLU_2024, 1e11), (TINY, 1e10)],
)
def test_all_five_constants_come_back_without_noise(law: ParametricLaw, first: float):
    fit = fit_parametric(isoflop_grid(law, [first, 2 * first, 4 * first, 8 * first], span=5.0))
    for name in NAMES:
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-8), name
    assert fit.objective < 1e-20 and fit.rms < 1e-10 and not fit.at_floor


def test_least_squares_agrees_with_scipy():
    # with delta far above all residuals the Huber loss is a square
    runs = noisy(isoflop_grid(TINY, [1e10, 1e11, 1e12]), 0.003)
    ours = fit_parametric(runs, delta=1.0).law

    def log_law(columns, E, log_A, log_B, alpha, beta):
        N, D = columns
        return np.log(E + np.exp(log_A - alpha * np.log(N)) + np.exp(log_B - beta * np.log(D)))

    start = [0.4, math.log(20), math.log(200), 0.4, 0.4]
    theirs, _ = curve_fit(
        log_law, (runs.parameters, runs.tokens), np.log(runs.loss), start, xtol=1e-14, ftol=1e-14
    )
    mine = [ours.E, math.log(ours.A), math.log(ours.B), ours.alpha, ours.beta]
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_no_neighbor_is_better():
    runs = noisy(isoflop_grid(TINY, [1e10, 1e11, 1e12, 1e13]), 0.005)
    fit = fit_parametric(runs)
    law = fit.law
    theta = np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta])
    assert huber_objective(theta, runs) == pytest.approx(fit.objective, rel=1e-9)
    rng = np.random.default_rng(1)
    for scale in (1e-4, 1e-3, 1e-2):
        for _ in range(50):
            assert huber_objective(theta + scale * rng.normal(size=5), runs) > fit.objective


def test_warm_start_finds_the_same_law():
    runs = noisy(isoflop_grid(TINY, [1e10, 1e11, 1e12, 1e13]), 0.005)
    cold, warm = fit_parametric(runs), fit_parametric(runs, start=TINY)
    assert warm.law.E == pytest.approx(cold.law.E, rel=1e-5)
    flat = ParametricLaw(E=0.0, A=30.0, B=300.0, alpha=0.5, beta=0.45)
    assert fit_parametric(runs, start=flat).law.E > 0


def test_huber_ignores_an_outlier_where_squares_do_not():
    clean = isoflop_grid(TINY, [1e10, 1e11, 1e12, 1e13])
    loss = clean.loss.copy()
    loss[7] *= 1.2
    dirty = Runs(parameters=clean.parameters, tokens=clean.tokens, loss=loss)
    robust, square = fit_parametric(dirty).law, fit_parametric(dirty, delta=10.0).law
    assert abs(robust.E / TINY.E - 1) < 0.01 < abs(square.E / TINY.E - 1)


def test_runs_without_a_floor_are_flagged():
    law = ParametricLaw(E=0.0, A=30.0, B=300.0, alpha=0.5, beta=0.45)
    fit = fit_parametric(isoflop_grid(law, [1e10, 1e11, 1e12, 1e13]))
    assert fit.at_floor and fit.law.alpha == pytest.approx(0.5, rel=1e-3)


def test_huber_by_hand():
    np.testing.assert_allclose(huber(np.array([0.5, -1.0, 3.0]), 1.0), [0.125, 0.5, 2.5])
    assert huber(np.array(2e-3)) == pytest.approx(1e-3 * 1.5e-3)


def test_log_loss_is_the_logarithm_of_the_loss():
    theta = np.array([math.log(TINY.A), math.log(TINY.B), math.log(TINY.E), TINY.alpha, TINY.beta])
    N, D = np.array([1e3, 1e5, 1e7]), np.array([1e6, 1e5, 1e4])
    np.testing.assert_allclose(log_loss(theta, np.log(N), np.log(D)), np.log(TINY.loss(N, D)), rtol=1e-13)
    stacked = log_loss(np.stack([theta, theta + 1]), np.log(N), np.log(D))
    assert stacked.shape == (2, 3)
    np.testing.assert_allclose(stacked[0], np.log(TINY.loss(N, D)), rtol=1e-13)
    # a constant of e^800 overflows as a number, not as a logarithm
    assert np.isfinite(log_loss(np.array([800.0, 0, 0, 1, 1]), np.log(N), np.log(D))).all()


def test_power_law_by_hand():
    law = fit_power_law(np.array([1.0, 10.0, 100.0]), np.array([3.0, 30.0, 300.0]) ** 0.5)
    assert law.exponent == pytest.approx(0.5) and law.coefficient == pytest.approx(3**0.5)


def test_kaplan_comes_back():
    N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e10, 3)))
    fit = fit_kaplan(Runs(parameters=N, tokens=D, loss=KAPLAN_2020.loss(N, D)))
    for name in ("N_c", "D_c", "alpha_N", "alpha_D"):
        assert getattr(fit, name) == pytest.approx(getattr(KAPLAN_2020, name), rel=1e-6)


def test_runs_as_columns():
    runs = Runs(parameters=np.array([10, 20]), tokens=np.array([200.0, 100.0]), loss=np.array([2.0, 1.0]))
    np.testing.assert_array_equal(runs.flops, [12_000.0, 12_000.0])
    np.testing.assert_array_equal(runs.budgets(), [12_000.0])
    assert len(runs) == 2 and runs.take(np.array([1, 1, 0])).loss.tolist() == [1.0, 1.0, 2.0]
    # runs planned for one budget keep one budget through rounding
    sizes = np.geomspace(1e3, 1e5, 7)
    assert len(Runs(parameters=sizes, tokens=1e11 / 6 / sizes, loss=np.ones(7)).budgets()) == 1


def test_errors():
    ones = np.ones(8)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"loss\[3\]="):
            Runs(parameters=ones, tokens=ones, loss=np.where(np.arange(8) == 3, bad, 1.0))
    with pytest.raises(ValueError, match=r"tokens has shape \(7,\)"):
        Runs(parameters=ones, tokens=ones[:7], loss=ones, flops=ones)
    few = isoflop_grid(TINY, [1e10], n_sizes=5)
    with pytest.raises(ValueError, match=r"5 runs: this law needs at least 6"):
        fit_parametric(few)
    with pytest.raises(ValueError, match=r"3 runs: this law needs at least 4"):
        fit_kaplan(few.take(np.arange(3)))
    with pytest.raises(ValueError, match="same parameters"):
        fit_parametric(Runs(parameters=ones, tokens=np.arange(1.0, 9.0), loss=ones))
    with pytest.raises(ValueError, match="same tokens"):
        fit_parametric(Runs(parameters=np.arange(1.0, 9.0), tokens=ones, loss=ones))
    with pytest.raises(ValueError, match="at least 2 distinct"):
        fit_power_law(ones, ones)
    with pytest.raises(ValueError, match="positive, finite"):
        fit_power_law(np.array([1.0, 2.0]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"x has shape \(8,\), y \(7,\)"):
        fit_power_law(ones, ones[:7])
