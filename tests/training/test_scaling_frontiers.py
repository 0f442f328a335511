"""Approaches 1 and 2: recovery of known exponents, a parabola by hand, the bias of coarse grids, errors."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.training.scaling_fits import Runs
from llmcourse.training.scaling_frontiers import (
    TrainingCurve,
    fit_envelope,
    fit_isoflop,
    fit_parabola,
    isoflop_bias,
    isoflop_grid,
)
from llmcourse.training.scaling_laws import BESIROGLU_2024, HOFFMANN_2022, ParametricLaw

BUDGETS = [1e18, 1e19, 1e20, 1e21]


def curves(law: ParametricLaw, n_sizes: int = 40, longest: float = 1e13) -> list[TrainingCurve]:
    tokens = np.geomspace(1e7, longest, 300)
    return [
        TrainingCurve(parameters=N, flops=6 * N * tokens, tokens=tokens, loss=law.loss(N, tokens))
        for N in np.geomspace(1e7, 1e11, n_sizes)
    ]


def test_envelope_finds_the_exponents():
    frontier = fit_envelope(curves(BESIROGLU_2024))
    assert frontier.size_law.exponent == pytest.approx(BESIROGLU_2024.a, abs=0.005)
    assert frontier.token_law.exponent == pytest.approx(BESIROGLU_2024.b, abs=0.005)
    inside = ~frontier.at_edge
    assert 0.5 < inside.mean() < 1
    best = [BESIROGLU_2024.optimal(c) for c in frontier.flops[inside]]
    np.testing.assert_allclose(frontier.parameters[inside], [b.parameters for b in best], rtol=0.2)
    np.testing.assert_allclose(
        frontier.loss[inside], [BESIROGLU_2024.loss(b.parameters, b.tokens) for b in best], rtol=1e-3
    )


def test_envelope_errors():
    with pytest.raises(ValueError, match="2 sizes: an envelope"):
        fit_envelope(curves(BESIROGLU_2024, n_sizes=2))
    short = [c for c in curves(BESIROGLU_2024, n_sizes=4, longest=1e8) if c.parameters > 1e8]
    with pytest.raises(ValueError, match="smallest or the largest one everywhere|reached by 3 sizes"):
        fit_envelope([*short, curves(BESIROGLU_2024, n_sizes=4, longest=1e8)[0]])
    apart = [
        TrainingCurve(parameters=N, flops=np.array([N, 2 * N]), tokens=np.ones(2), loss=np.ones(2))
        for N in (1.0, 10.0, 100.0)
    ]
    with pytest.raises(ValueError, match="no amount of compute is reached by 3 sizes"):
        fit_envelope(apart)
    with pytest.raises(ValueError, match="a curve of 1 points"):
        TrainingCurve(parameters=1.0, flops=np.ones(1), tokens=np.ones(1), loss=np.ones(1))
    with pytest.raises(ValueError, match="must increase"):
        TrainingCurve(parameters=1.0, flops=np.ones(2), tokens=np.ones(2), loss=np.ones(2))


def test_parabola_by_hand():
    # L = 2 + 0.25 (ln N - ln 1000)^2, D = 1e6 / N
    N = 1000.0 * np.array([0.2, 0.7, 2.0, 6.0])
    loss = 2 + 0.25 * np.log(N / 1000) ** 2
    found = fit_parabola(N, 1e6 / N, loss, 6e6)
    assert found.parameters == pytest.approx(1000) and found.tokens == pytest.approx(1000)
    assert found.loss == pytest.approx(2) and found.curvature == pytest.approx(0.25) and found.inside
    np.testing.assert_allclose(found(N), loss, rtol=1e-12)


def test_a_bottom_outside_the_sizes_is_flagged():
    N = np.array([2e3, 4e3, 8e3])
    runs = [2 + 0.25 * np.log(N / best) ** 2 for best in (1000.0, 4000.0)]
    both = Runs(
        parameters=np.tile(N, 2),
        tokens=np.concatenate([1e9 / N, 4e9 / N]),
        loss=np.concatenate(runs),
        flops=np.repeat([6e9, 24e9], 3),
    )
    fit = fit_isoflop(both)
    assert fit.extrapolated == (6e9,)
    assert [p.parameters for p in fit.parabolas] == pytest.approx([1000, 4000])
    assert fit.size_law.exponent == pytest.approx(1.0)
    np.testing.assert_allclose(fit.loss(both), both.loss, rtol=1e-12)


def test_equal_exponents_on_centered_grids_are_exact():
    law = ParametricLaw(E=1.0, A=400.0, B=900.0, alpha=0.35, beta=0.35)
    bias = isoflop_bias(law, BUDGETS, span=16.0)
    assert bias.fitted_exponent == pytest.approx(0.5, abs=1e-10)
    np.testing.assert_allclose(bias.size_ratios, 1.0, rtol=1e-9)


def test_centered_grids_bias_the_size_and_not_the_exponent():
    near, far = (isoflop_bias(HOFFMANN_2022, BUDGETS, span=span) for span in (4.0, 16.0))
    for bias in (near, far):
        assert bias.fitted_exponent == pytest.approx(bias.true_exponent, abs=1e-9)
        assert np.ptp(bias.size_ratios) < 1e-9  # one factor for all budgets
    assert 1.01 < near.size_ratios[0] < 1.03 < far.size_ratios[0]


def test_off_center_grids_change_the_factor():
    centered, shifted = (isoflop_bias(BESIROGLU_2024, BUDGETS, span=16.0, offset=o) for o in (1.0, 4.0))
    assert abs(shifted.size_ratios[0] - 1) > 2 * abs(centered.size_ratios[0] - 1)
    assert shifted.fitted_exponent == pytest.approx(BESIROGLU_2024.a, abs=1e-9)


def test_grids_that_drift_bias_the_exponent():
    # the same sizes for all budgets: centered at the first budget, too small at the last
    law = ParametricLaw(E=1.0, A=400.0, B=900.0, alpha=0.35, beta=0.35)
    fixed = isoflop_bias(law, BUDGETS, span=16.0, drift=-law.a)
    assert abs(fixed.fitted_exponent - law.a) > 0.01
    finer = isoflop_bias(law, BUDGETS, span=16.0, drift=-law.a, n_sizes=50)
    assert abs(finer.fitted_exponent - law.a) > 0.005  # more sizes do not help, a parabola is the wrong shape
    narrow = isoflop_bias(law, [1e18, 2e18, 4e18], span=2.0, drift=-law.a)
    assert abs(narrow.fitted_exponent - law.a) < 0.2 * abs(fixed.fitted_exponent - law.a)


def test_errors():
    runs = isoflop_grid(BESIROGLU_2024, [1e18])
    with pytest.raises(ValueError, match="one budget, 1e[+]18 FLOPs"):
        fit_isoflop(runs)
    with pytest.raises(ValueError, match="2 sizes at 1e[+]18 FLOPs: a parabola needs at least 3"):
        fit_isoflop(isoflop_grid(BESIROGLU_2024, [1e18, 1e19], n_sizes=2))
    with pytest.raises(ValueError, match="bend downwards"):
        fit_parabola(runs.parameters, runs.tokens, 10 - runs.loss, 1e18)
    for wrong in ({"span": 1.0}, {"n_sizes": 0}, {"offset": 0.0}):
        with pytest.raises(ValueError, match="give budgets, sizes"):
            isoflop_grid(BESIROGLU_2024, [1e18], **wrong)
    with pytest.raises(ValueError, match="0 budgets"):
        isoflop_grid(BESIROGLU_2024, [])
