"""How well a step of data preparation finds what it looks for: precision, recall and F1 against known labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """The four counts of a yes-or-no decision compared with the truth (van Rijsbergen, 1979, chapter 7).

    "Positive" is what the step looks for: spam to drop, a page in a foreign language, a piece of personal data.
    Where nothing can be a true negative (how many pieces of personal data does a text not hold?) the fourth
    count is 0 and plays no part, since none of the ratios needs it.

    Counts, not only ratios, are kept so that the caller can put an interval on a ratio: precision is
    `true_positives` of `n_flagged` trials, recall is `true_positives` of `n_positive`, which is what
    `evaluation.statistics.wilson_interval` takes.

    Attributes:
        true_positives: flagged, and rightly so.
        false_positives: flagged, wrongly.
        false_negatives: missed.
        true_negatives: left alone, and rightly so.

    Raises:
        ValueError: a count is negative.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int = 0

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if count < 0:
                raise ValueError(f"{name}={count}: a count is 0 or more")

    def __add__(self, other: Detection) -> Detection:
        """Counts of two disjoint sets of decisions together."""
        return Detection(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f} ({self.true_positives} of {self.n_flagged}), "
            f"recall {self.recall:.3f} ({self.true_positives} of {self.n_positive}), F1 {self.f1:.3f}"
        )

    @property
    def n_flagged(self) -> int:
        """How many the step flagged: the trials behind the precision."""
        return self.true_positives + self.false_positives

    @property
    def n_positive(self) -> int:
        """How many it should have flagged: the trials behind the recall."""
        return self.true_positives + self.false_negatives

    @property
    def precision(self) -> float:
        """Share of the flagged that were rightly flagged; nan if none was flagged."""
        return _ratio(self.true_positives, self.n_flagged)

    @property
    def recall(self) -> float:
        """Share of what should be flagged that was; nan if there was none to flag."""
        return _ratio(self.true_positives, self.n_positive)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN).

        It is 0 when something was flagged or was to be flagged and nothing was right, also where precision or
        recall alone is undefined; nan only if all three counts are 0.
        """
        return _ratio(2 * self.true_positives, self.n_flagged + self.n_positive)


def score(dropped: Sequence[bool], truth: Sequence[bool]) -> Detection:
    """Compare a step's decisions with the truth, item by item.

    Args:
        dropped: what the step flagged or dropped.
        truth: what it should have.

    Raises:
        ValueError: the two differ in length.
    """
    if len(dropped) != len(truth):
        raise ValueError(f"{len(dropped)} decisions for {len(truth)} labels: give one decision a label")
    pairs = [(bool(flag), bool(label)) for flag, label in zip(dropped, truth, strict=True)]
    return Detection(
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
