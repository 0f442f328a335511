"""Shares of several sources in a run: how much of each, and how often each is then repeated.

The weights of a mixture are shares of tokens, since a model learns per token. They are chosen by hand, or by
temperature from the sizes, p_i proportional to n_i^(1/t): t = 1 keeps the natural proportions, a higher t
lifts small sources, t = infinity makes all equal (for their many languages
multilingual BERT, Devlin et al. 2018, took t = 1/0.7, and mT5, Xue et al. 2021, t = 1/0.3).

What is lifted is repeated. Muennighoff et al. 2023 ("Scaling Data-Constrained Language Models") measured that
up to about 4 epochs repeated tokens are worth nearly as much as fresh ones, and fitted the worth of more as an
exponential decay; `effective_epochs` is that law. UniMax (Chung et al. 2023) caps the epochs of each source
instead of raising a temperature, and hands the rest to the others; `plan_mixture(max_epochs=...)` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

HARMLESS_EPOCHS = 4.0
"""epochs up to which repetition costs next to nothing (Muennighoff et al. 2023, abstract)"""
REPETITION_DECAY = 15.39
"""their fitted R*_D: the number of repetitions after which one more is worth 1/e of a fresh epoch"""


def temperature_weights(tokens: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Shares p_i proportional to n_i^(1/t), summing to 1.

    Args:
        tokens: size of each source, n_i, in tokens or any unit that all share.
        temperature: t, above 0; `math.inf` makes all shares equal.

    Raises:
        ValueError: no sources, a size that is not above 0, or a temperature that is not above 0.
    """
    if not tokens:
        raise ValueError("tokens is empty: name at least one source with its size")
    for name, size in tokens.items():
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"tokens[{name!r}]={size}: must be above 0; leave empty sources out")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0; 1 keeps natural proportions")
    logits = {name: math.log(size) / temperature for name, size in tokens.items()}
    top = max(logits.values())  # subtracted, so that low temperatures do not overflow
    scaled = {name: math.exp(value - top) for name, value in logits.items()}
    return normalized(scaled)


def effective_epochs(epochs: float, decay: float = REPETITION_DECAY) -> float:
    """What some epochs over one source are worth, in epochs of fresh data.

    Muennighoff et al. 2023, effective data D' over unique data U_D: 1 + R* (1 - exp(-R / R*)) with R = epochs - 1
    repetitions. Below one epoch nothing is repeated, and the worth is the epochs themselves. 4 epochs are worth 3.73
    and no number of epochs is worth more than 1 + R* = 16.39.

    Args:
        epochs: passes over the source, at least 0.
        decay: R*, in repetitions; the default is the paper's fit for web text.

    Raises:
        ValueError: negative epochs, or a decay that is not above 0.
    """
    if not epochs >= 0:
        raise ValueError(f"epochs={epochs}: must be at least 0")
    if not decay > 0:
        raise ValueError(f"decay={decay}: must be above 0")
    return epochs if epochs <= 1 else 1 + decay * -math.expm1(-(epochs - 1) / decay)


class MixturePart(NamedTuple):
    """One source's part in a run."""

    weight: float
    """share of the run's tokens"""
    tokens: float
    """tokens of the run that come from it"""
    epochs: float
    """passes over it"""
    effective_tokens: float
    """fresh tokens that these passes are worth"""


@dataclass(frozen=True)
class MixturePlan:
    """What a mixture means for a run of a given length.

    Attributes:
        parts: by the source's name.
        warnings: one line for each source that is repeated more than `HARMLESS_EPOCHS` times.
    """

    parts: dict[str, MixturePart]
    warnings: tuple[str, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Share of each source, as `MixtureSettings` takes them."""
        return {name: part.weight for name, part in self.parts.items()}

    @property
    def effective_tokens(self) -> float:
        """Fresh tokens that the whole run is worth."""
        return sum(part.effective_tokens for part in self.parts.values())


def plan_mixture(
    tokens: Mapping[str, float],
    budget: float,
    *,
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    max_epochs: float = math.inf,
) -> MixturePlan:
    """Turn sizes and wishes into shares, epochs and warnings.

    Args:
        tokens: size of each source in tokens.
        budget: tokens of the run.
        weights: wished shares, in any unit; None: by temperature from the sizes.
        temperature: of `temperature_weights`, used when there are no weights.
        max_epochs: no source is repeated more often; what a capped source does not give, the others give in
            proportion to their weights.

    Raises:
        ValueError: a size, weight, budget or limit that is not above 0, weights of other names than the sizes, or a
            budget that `max_epochs` passes over all sources cannot fill.
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"budget={budget} tokens: must be above 0")
    if not max_epochs > 0:
        raise ValueError(f"max_epochs={max_epochs}: must be above 0")
    natural = temperature_weights(tokens, temperature)  # checks the sizes, too
    wished = natural if weights is None else normalized(check_weights(weights, tokens))
    limit = {name: max_epochs * size / budget for name, size in tokens.items()}
    shares = _capped(wished, limit, budget)
    parts, warnings = {}, []
    for name, size in tokens.items():
        epochs = shares[name] * budget / size
        worth = effective_epochs(epochs)
        parts[name] = MixturePart(shares[name], shares[name] * budget, epochs, worth * size)
        if epochs > HARMLESS_EPOCHS:
            warnings.append(
                f"{name}: {epochs:.1f} epochs, worth {worth:.1f} of fresh data; above {HARMLESS_EPOCHS:.0f} epochs "
                "repetition costs (Muennighoff et al. 2023): lower its weight or find more of it"
            )
    return MixturePlan(parts, tuple(warnings))


def normalized(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights over their sum."""
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def check_weights(weights: Mapping[str, float], expected: Mapping[str, Any]) -> Mapping[str, float]:
    """The weights, if they are positive and name exactly what `expected` names.

    Raises:
        ValueError: they do not.
    """
    if weights.keys() != expected.keys():
        raise ValueError(f"weights name {sorted(weights)}, the sources are {sorted(expected)}: name the same")
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weights[{name!r}]={weight}: must be above 0; leave unused sources out")
    return weights


def _capped(wished: dict[str, float], limit: dict[str, float], budget: float) -> dict[str, float]:
    """Shares at most `limit`, the rest spread over the uncapped in proportion; capping one may cap another."""
    if math.fsum(limit.values()) < 1 - 1e-12:
        raise ValueError(
            f"budget={budget:.0f} tokens: all sources together give at most "
            f"{math.fsum(limit.values()) * budget:.0f} within max_epochs; train shorter or repeat more"
        )
    shares, capped = dict(wished), set()
    while over := {name for name, share in shares.items() if share > limit[name] and name not in capped}:
        capped |= over
        free = 1 - math.fsum(limit[name] for name in capped)
        rest = math.fsum(wished[name] for name in wished if name not in capped)
        shares = {name: limit[name] if name in capped else wished[name] / rest * free for name in wished}
    return shares
