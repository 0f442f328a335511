"""The laws' formulas: closed forms against brute force, published constants, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from llmcourse.training.scaling_laws import (
    BESIROGLU_2024,
    GOPHER_FLOPS,
    HOFFMANN_2022,
    HOFFMANN_2022_SOURCE,
    KAPLAN_2020,
    Allocation,
    KaplanLaw,
    ParametricLaw,
    PowerLaw,
)

LAW = ParametricLaw(E=0.5, A=30.0, B=300.0, alpha=0.5, beta=0.4)


def test_loss_by_hand():
    law = ParametricLaw(E=1.0, A=4.0, B=27.0, alpha=0.5, beta=1 / 3)
    assert law.loss(16, 27) == pytest.approx(1 + 4 / 4 + 27 / 3, rel=1e-14)
    np.testing.assert_allclose(law.loss(np.array([16, 64]), 27), [11.0, 10.5], rtol=1e-14)
    assert law.tokens_for(11.0, 16) == pytest.approx(27, rel=1e-12)
    assert law.tokens_for(2.0, 16) == math.inf


def test_equal_exponents_by_hand():
    # alpha = beta and A = B: G = 1, so N = D = sqrt(C / 6)
    law = ParametricLaw(E=1.0, A=10.0, B=10.0, alpha=0.3, beta=0.3)
    best = law.optimal(6e10)
    assert best.parameters == pytest.approx(1e5) and best.tokens == pytest.approx(1e5)
    assert law.tokens_per_parameter(6e10) == pytest.approx(1) == pytest.approx(law.tokens_per_parameter(6e16))


@pytest.mark.parametrize("flops", [1e10, 1e18])
def test_the_closed_form_is_the_minimum(flops: float):
    best = LAW.optimal(flops)
    assert best.training_flops == pytest.approx(flops, rel=1e-12)
    numeric = minimize_scalar(
        lambda n: LAW.loss(math.exp(n), flops / 6 / math.exp(n)), bounds=(1, 40), method="bounded"
    )
    assert best.parameters == pytest.approx(math.exp(numeric.x), rel=1e-3)
    assert LAW.loss(best.parameters, best.tokens) <= numeric.fun + 1e-12
    assert LAW.a + LAW.b == pytest.approx(1)
    assert LAW.optimal(100 * flops).parameters / best.parameters == pytest.approx(100**LAW.a)


def test_another_cost_of_a_token():
    assert LAW.optimal(4e10, 4.0).parameters == pytest.approx(LAW.optimal(6e10).parameters)
    assert LAW.optimal(4e10, 4.0).training_flops == pytest.approx(4e10)


def test_published_constants_at_the_budget_of_gopher():
    # Hoffmann et al. (2022, figure 4) give 40 billion parameters, which their rounded constants do not.
    source = HOFFMANN_2022_SOURCE.optimal(GOPHER_FLOPS)
    assert source.parameters == pytest.approx(40.3e9, rel=1e-3)
    assert source.tokens_per_parameter == pytest.approx(59.1, abs=0.1)
    rounded = HOFFMANN_2022.optimal(GOPHER_FLOPS)
    assert rounded.parameters == pytest.approx(32.2e9, rel=1e-3)
    assert rounded.tokens_per_parameter == pytest.approx(92.6, abs=0.1)
    # Besiroglu et al. (2024): about 20 tokens a parameter, as Chinchilla's 70 billion and 1.4 trillion
    again = BESIROGLU_2024.optimal(GOPHER_FLOPS)
    assert again.parameters == pytest.approx(72.2e9, rel=1e-3)
    assert again.tokens_per_parameter == pytest.approx(18.4, abs=0.05)
    assert BESIROGLU_2024.a == pytest.approx(0.5126, abs=1e-4)


def test_kaplan_limits_are_power_laws():
    law = KAPLAN_2020
    assert law.loss(1e9, math.inf) == pytest.approx((law.N_c / 1e9) ** law.alpha_N, rel=1e-12)
    assert law.loss(math.inf, 1e9) == pytest.approx((law.D_c / 1e9) ** law.alpha_D, rel=1e-12)
    assert law.loss(1e9, 1e9) > law.loss(1e9, math.inf)


def test_power_law_and_allocation_by_hand():
    assert PowerLaw(coefficient=2.0, exponent=-0.5)(16) == pytest.approx(0.5)
    both = Allocation(parameters=10, tokens=200, inference_tokens=300)
    assert both.training_flops == 12_000 and both.inference_flops == 6_000
    assert both.total_flops == 18_000 and both.tokens_per_parameter == 20


def test_without_inference_the_cheapest_model_is_compute_optimal():
    best = LAW.optimal(1e14)
    same = LAW.inference_optimal(float(LAW.loss(best.parameters, best.tokens)), 0)
    assert same.parameters == pytest.approx(best.parameters, rel=1e-9)
    assert same.tokens == pytest.approx(best.tokens, rel=1e-9)


@pytest.mark.parametrize("inference", [1e7, 1e10, 1e13])
def test_inference_makes_smaller_models_that_train_longer(inference: float):
    best = LAW.optimal(1e14)
    target = float(LAW.loss(best.parameters, best.tokens))
    cheapest = LAW.inference_optimal(target, inference)
    assert LAW.loss(cheapest.parameters, cheapest.tokens) == pytest.approx(target, rel=1e-12)
    assert cheapest.parameters < best.parameters and cheapest.tokens > best.tokens

    def cost(log_size: float) -> float:
        size = math.exp(log_size)
        return 6 * size * LAW.tokens_for(target, size) + 2 * size * inference

    least = ((LAW.A / (target - LAW.E)) ** (1 / LAW.alpha)) * (1 + 1e-9)
    sizes = np.linspace(math.log(least), math.log(best.parameters), 20_001)[1:]
    assert cheapest.total_flops <= min(map(cost, sizes)) * (1 + 1e-9)
    assert cheapest.total_flops == pytest.approx(min(map(cost, sizes)), rel=1e-4)


def test_errors():
    for name in ("A", "B", "alpha", "beta"):
        with pytest.raises(ValueError, match=rf"{name}=0"):
            ParametricLaw(**({"E": 1.0, "A": 1.0, "B": 1.0, "alpha": 1.0, "beta": 1.0} | {name: 0.0}))
    with pytest.raises(ValueError, match="E=-1"):
        ParametricLaw(E=-1.0, A=1.0, B=1.0, alpha=1.0, beta=1.0)
    assert ParametricLaw(E=0.0, A=1.0, B=1.0, alpha=1.0, beta=1.0).loss(1, 1) == 2
    with pytest.raises(ValueError, match="D_c=nan"):
        KaplanLaw(N_c=1.0, D_c=math.nan, alpha_N=1.0, alpha_D=1.0)
    with pytest.raises(ValueError, match=r"flops=0: give a positive budget"):
        LAW.optimal(0)
    with pytest.raises(ValueError, match=r"loss=0\.5: no model gets below E=0\.5"):
        LAW.inference_optimal(0.5, 1.0)
    with pytest.raises(ValueError, match=r"inference_tokens=-1"):
        LAW.inference_optimal(1.0, -1.0)
