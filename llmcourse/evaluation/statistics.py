"""Intervals for the three kinds of numbers the course reports: shares, means over examples, means over seeds.

A share of right answers gets a Wilson interval, a mean over examples (or any other statistic of them) a
bootstrap interval, a mean over a handful of training runs a Student interval. Two systems scored on the same
examples are compared pair by pair, which removes the difficulty of the examples from the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval.

    Prints as `0.63 [0.57, 0.69], n=256`; a format specification applies to the three numbers:
    `f"{estimate:.1%}"`.

    Attributes:
        value: the estimate itself.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of independent observations behind it: examples, pairs or seeds.
        method: how the interval was made: "wilson", "bootstrap", "paired bootstrap" or "student".
        confidence: share of such intervals that contain the truth, nominally.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    confidence: float = 0.95

    def __format__(self, specification: str) -> str:
        value, low, high = (format(x, specification or ".2f") for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}], n={self.n}"

    def __str__(self) -> str:
        return format(self, "")

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly above or wholly below this value."""
        return not self.low <= value <= self.high


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Score interval for the share of successes in n independent trials (Wilson, 1927).

    It holds the shares p whose own normal approximation does not reject the observed share s, that is |s - p|
    <= z sqrt(p (1 - p) / n). Unlike s +- z sqrt(s (1 - s) / n) it stays inside [0, 1] and has a width when no
    trial or every trial succeeds, which happens in small evaluations all the time.

    Raises:
        ValueError: n is below 1, successes are not within 0 to n, or confidence is not between 0 and 1.
    """
    _check_confidence(confidence)
    if n < 1:
        raise ValueError(f"n={n}: a share needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes}: must be from 0 to n={n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # the ends are exactly 0 and 1 when none or all succeed, but come out some 1e-17 beyond
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Estimate(share, low, high, n, "wilson", confidence)


def bootstrap_interval(
    values: Values,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Percentile bootstrap of a statistic of independent examples (Efron, 1979).

    The interval spans the central share `confidence` of the statistic over samples of n drawn with
    replacement from the n values. It is somewhat too narrow for small n (for the mean by about a factor
    sqrt((n - 1) / n), and it ignores the tails of Student's t), so use `seed_interval` for a handful of runs.

    Args:
        values: (n,) one number per example.
        statistic: maps an (n,) array to a number.
        n_resamples: samples drawn; the ends of the interval move by a few percent of its width at 5 000.
        seed: of the draws; the same seed gives the same interval.
        confidence: share of such intervals that contain the truth, nominally.

    Raises:
        ValueError: fewer than 2 values, a value that is not finite, no resamples, or confidence not between 0
            and 1.
    """
    return _bootstrap(values, statistic, n_resamples, seed, confidence, "bootstrap")


def paired_bootstrap(
    a: Values, b: Values, *, n_resamples: int = 5_000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Percentile bootstrap of mean(a - b) for two systems scored on the same examples (Koehn, 2004).

    Examples are resampled with both their scores, so what makes an example hard for both cancels. An interval
    that excludes 0 says that the systems differ on such examples; it says nothing about other training seeds.

    Args:
        a: (n,) scores of one system.
        b: (n,) scores of the other, in the same order of examples.
        n_resamples: as in `bootstrap_interval`.
        seed: as in `bootstrap_interval`.
        confidence: as in `bootstrap_interval`.

    Raises:
        ValueError: a and b differ in length, and as in `bootstrap_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} scores against {len(b)}: pairs need the same examples in the same order")
    difference = _checked(a) - _checked(b)
    return _bootstrap(difference, np.mean, n_resamples, seed, confidence, "paired bootstrap")


def seed_interval(values: Values, confidence: float = 0.95) -> Estimate:
    """Student's interval for the mean of a result over training runs with different seeds (Student, 1908).

    The half width is t s / sqrt(n), with s the standard deviation (divisor n - 1) and t the quantile of
    Student's distribution with n - 1 degrees of freedom: 4.30 for three seeds where the normal distribution
    says 1.96. It assumes results that scatter about normally.

    Args:
        values: (n,) one result per run.
        confidence: share of such intervals that contain the truth.

    Raises:
        ValueError: fewer than 2 runs, a result that is not finite, or confidence not between 0 and 1.
    """
    _check_confidence(confidence)
    runs = _checked(values)
    quantile = float(stdtrit(len(runs) - 1, (1 + confidence) / 2))
    half = quantile * float(runs.std(ddof=1)) / sqrt(len(runs))
    mean = float(runs.mean())
    return Estimate(mean, mean - half, mean + half, len(runs), "student", confidence)


def _bootstrap(
    values: Values,
    statistic: Callable[[np.ndarray], float],
    n_resamples: int,
    seed: int,
    confidence: float,
    method: str,
) -> Estimate:
    _check_confidence(confidence)
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples}: must be at least 1")
    sample = _checked(values)
    generator = np.random.default_rng(seed)
    resampled = [
        float(statistic(sample[generator.integers(len(sample), size=len(sample))]))
        for _ in range(n_resamples)
    ]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(statistic(sample)), float(low), float(high), len(sample), method, confidence)


def _checked(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"values of shape {array.shape}: a spread needs at least 2 numbers in one row")
    if not np.isfinite(array).all():
        raise ValueError(
            f"value {array[~np.isfinite(array)][0]}: all must be finite; drop failed runs and say so"
        )
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")
