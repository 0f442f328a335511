"""Scaling laws as formulas: loss as a function of parameters and tokens, and the best split of a budget that follows.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token. How the constants are found from
training runs is in `llmcourse.training.scaling_fits` and `scaling_frontiers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq

Numbers = float | np.ndarray

GOPHER_FLOPS = 5.76e23
"""training compute of Gopher, the budget that Hoffmann et al. (2022) planned Chinchilla for"""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coefficient x^exponent: a straight line of slope `exponent` on logarithmic axes."""

    coefficient: float
    """y at x = 1"""
    exponent: float
    """d ln y / d ln x"""

    def __call__(self, x: Numbers) -> Numbers:
        """y at x > 0."""
        return self.coefficient * np.asarray(x, float)[()] ** self.exponent


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A model size and a number of training tokens."""

    parameters: float
    """N"""
    tokens: float
    """D, training tokens"""
    inference_tokens: float = 0.0
    """tokens that the model will process after training"""
    flops_per_parameter_token: float = field(default=6.0, repr=False)
    """training FLOPs per parameter and token; a forward pass alone costs a third"""

    @property
    def training_flops(self) -> float:
        """6 N D."""
        return self.flops_per_parameter_token * self.parameters * self.tokens

    @property
    def inference_flops(self) -> float:
        """2 N per token that the model will process."""
        return self.flops_per_parameter_token / 3 * self.parameters * self.inference_tokens

    @property
    def total_flops(self) -> float:
        """Training and inference together."""
        return self.training_flops + self.inference_flops

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


@dataclass(frozen=True, kw_only=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, eq. 2).

    E is what no model of any size could predict, the entropy of the text; the second term is what a model of N
    parameters lacks with endless data, the third what D tokens are too few for.

    Raises:
        ValueError: a constant is not positive and finite (E may be 0).
    """

    E: float
    """irreducible loss in nats per token"""
    A: float
    """scale of the size term"""
    B: float
    """scale of the data term"""
    alpha: float
    """exponent of the size term"""
    beta: float
    """exponent of the data term"""

    def __post_init__(self) -> None:
        for name in ("E", "A", "B", "alpha", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (name == "E" and value == 0))):
                raise ValueError(f"{name}={value}: give a positive number")

    @property
    def a(self) -> float:
        """Exponent of the best size, N_opt ~ C^a: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the best number of tokens, D_opt ~ C^b: alpha / (alpha + beta), so a + b = 1."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        """(alpha A / (beta B))^(1 / (alpha + beta)), what the balance of the two terms puts in front of the powers."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """L in nats per token; arrays broadcast."""
        parameters, tokens = np.asarray(parameters, float)[()], np.asarray(tokens, float)[()]
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def tokens_for(self, loss: float, parameters: float) -> float:
        """Training tokens after which a model of that size reaches `loss`; infinite if it never does."""
        left = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def optimal(self, flops: float, flops_per_parameter_token: float = 6.0) -> Allocation:
        """The least loss for a budget C = 6 N D, in closed form (Hoffmann et al., 2022, eq. 4).

        N = G (C / 6)^a and D = (C / 6)^b / G: there the size term and the data term fall equally fast along C.

        Raises:
            ValueError: a budget that is not positive.
        """
        if not flops > 0:
            raise ValueError(f"flops={flops}: give a positive budget")
        product = flops / flops_per_parameter_token  # N D
        return Allocation(
            parameters=self.G * product**self.a,
            tokens=product**self.b / self.G,
            flops_per_parameter_token=flops_per_parameter_token,
        )

    def tokens_per_parameter(self, flops: float) -> float:
        """D / N of the optimum for a budget: constant only if alpha = beta."""
        return self.optimal(flops).tokens_per_parameter

    def inference_optimal(self, loss: float, inference_tokens: float) -> Allocation:
        """The cheapest way to `loss` when the model will then process `inference_tokens` (Sardana et al., 2024, eq. 3).

        Minimizes 6 N D + 2 N D_inference over the sizes that can reach the loss, with D = `tokens_for(loss, N)`. On
        that curve d ln D / d ln N = -alpha A N^-alpha / (beta B D^-beta), so the minimum is where

            6 D + 2 D_inference = 6 D (alpha A N^-alpha) / (beta B D^-beta),

        which has one root. Without inference the ratio on the right is 1: the compute-optimal model of that loss.

        Raises:
            ValueError: a loss at or below E, which no model reaches, or a negative number of tokens.
        """
        if not loss > self.E:
            raise ValueError(f"loss={loss}: no model gets below E={self.E}, ask for a higher loss")
        if not inference_tokens >= 0:
            raise ValueError(f"inference_tokens={inference_tokens}: give at least 0")
        reducible = loss - self.E

        # The share of the reducible loss that the size term takes names a point of the curve, in (0, 1).
        def point(logit: float) -> tuple[float, float, float, float]:
            share, rest = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
            N = (self.A / (share * reducible)) ** (1 / self.alpha)
            D = (self.B / (rest * reducible)) ** (1 / self.beta)
            return N, D, share, rest

        def balance(logit: float) -> float:
            _, D, share, rest = point(logit)
            gain = math.log(self.alpha * share) - math.log(self.beta * rest)
            return gain - math.log1p(inference_tokens / (3 * D))

        N, D, _, _ = point(brentq(balance, -60.0, 30.0, xtol=1e-13))
        return Allocation(parameters=float(N), tokens=float(D), inference_tokens=inference_tokens)


@dataclass(frozen=True, kw_only=True)
class KaplanLaw:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (Kaplan et al., 2020, eq. 1.5).

    N excludes embeddings and there is no irreducible loss: L falls to 0. With endless data L = (N_c / N)^alpha_N
    (eq. 1.1), with an endless model L = (D_c / D)^alpha_D (eq. 1.2).

    Raises:
        ValueError: a constant is not positive and finite.
    """

    N_c: float
    """parameters without embeddings at which L = 1 with endless data"""
    D_c: float
    """tokens at which L = 1 with an endless model"""
    alpha_N: float
    """exponent of size"""
    alpha_D: float
    """exponent of data"""

    def __post_init__(self) -> None:
        for name in ("N_c", "D_c", "alpha_N", "alpha_D"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: give a positive number")

    def loss(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """L in nats per token; arrays broadcast, infinity is allowed for either."""
        parameters, tokens = np.asarray(parameters, float)[()], np.asarray(tokens, float)[()]
        return ((self.N_c / parameters) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D


HOFFMANN_2022 = ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""Approach 3 as printed (Hoffmann et al., 2022, eq. 10), rounded to two digits."""

HOFFMANN_2022_SOURCE = ParametricLaw(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""The same with the digits of the paper's TeX source, as Besiroglu et al. (2024) report them. The 40 billion parameters
that Hoffmann et al. (2022, figure 4) give for Gopher's budget follow from these, not from the rounded ones."""

BESIROGLU_2024 = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Approach 3 fitted again to points read off the paper's figure (Besiroglu et al., 2024); standard errors 0.03, 124.58,
1293.23, 0.02, 0.02."""

KAPLAN_2020 = KaplanLaw(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
"""Both terms fitted together (Kaplan et al., 2020, table 2)."""
