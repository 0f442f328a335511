"""Can a classifier's probabilities be believed, and where should the line be drawn?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def choose_threshold(probabilities: np.ndarray, good: np.ndarray, precision: float) -> float:
    """The threshold that drops most of the bad texts while enough of the dropped ones are truly bad.

    Dropping is "probability below the threshold". Of thresholds that drop equally many bad texts the smallest is
    taken, which drops fewest good ones. It lies half-way between two neighboring probabilities, clear of both.

    Args:
        probabilities: (M,) probabilities of being good, none of them used for fitting.
        good: (M,) bool truth.
        precision: wanted share of bad texts among the dropped.

    Returns:
        The threshold; 0, which drops nothing, if no threshold reaches the precision.

    Raises:
        ValueError: the arrays differ in shape or are empty, or the precision is not above 0 and at most 1.
    """
    probabilities, good = np.asarray(probabilities, dtype=float), np.asarray(good, dtype=bool)
    if probabilities.shape != good.shape or not probabilities.size:
        raise ValueError(
            f"{probabilities.size} probabilities for {good.size} labels: give each text one of both"
        )
    if not 0 < precision <= 1:
        raise ValueError(f"precision={precision}: use a fraction above 0, at most 1")
    order = np.argsort(probabilities, kind="stable")
    ordered, bad = probabilities[order], ~good[order]
    found = np.cumsum(bad)  # (M,) bad texts among the first i + 1
    following = np.append(ordered[1:], 1.0)
    possible = (following > ordered) & (found >= precision * np.arange(1, len(bad) + 1)) & (found > 0)
    if not possible.any():
        return 0.0
    last = int(np.argmax(np.where(possible, found, 0)))  # the first of the best
    return float((ordered[last] + following[last]) / 2)


@dataclass(frozen=True)
class Reliability:
    """Predicted against observed frequency, in bins of the predicted probability.

    Attributes:
        predicted: mean probability of each bin that is not empty.
        observed: share of good texts in it.
        counts: texts in it.
        error: expected calibration error, the mean of |predicted - observed| over all texts (Naeini et al., 2015).
    """

    predicted: list[float]
    observed: list[float]
    counts: list[int]
    error: float


def reliability(probabilities: np.ndarray, good: np.ndarray, n_bins: int = 10) -> Reliability:
    """Reliability curve over bins of equal width, and its expected calibration error.

    Args:
        probabilities: (M,) from 0 to 1.
        good: (M,) bool truth.
        n_bins: bins between 0 and 1.

    Raises:
        ValueError: shapes differ, there are no texts, n_bins is below 1, or a probability is not within 0 to 1.
    """
    probabilities, good = np.asarray(probabilities, dtype=float), np.asarray(good, dtype=float)
    if probabilities.shape != good.shape or not probabilities.size:
        raise ValueError(
            f"{probabilities.size} probabilities for {good.size} labels: give each text one of both"
        )
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins}: use 1 or more")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must be from 0 to 1: give calibrated ones, not scores")
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    counts = np.bincount(bins, minlength=n_bins)
    filled = counts > 0
    predicted = np.bincount(bins, probabilities, n_bins)[filled] / counts[filled]
    observed = np.bincount(bins, good, n_bins)[filled] / counts[filled]
    error = float(np.abs(predicted - observed) @ counts[filled] / counts.sum())
    return Reliability(predicted.tolist(), observed.tolist(), counts[filled].tolist(), error)
