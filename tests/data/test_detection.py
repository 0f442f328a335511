"""Precision, recall and F1 of a step."""

from __future__ import annotations

import math
import random

import pytest
from sklearn.metrics import precision_recall_fscore_support

from llmcourse.data.detection import Detection, score
from llmcourse.evaluation.statistics import wilson_interval


def test_by_hand() -> None:
    # flagged: right, right, wrong; missed: one; left alone rightly: two
    found = score([True, True, True, False, False, False], [True, True, False, True, False, False])
    assert found == Detection(2, 1, 1, 2)
    assert found.n_flagged == 3 and found.n_positive == 3
    assert found.precision == 2 / 3 and found.recall == 2 / 3
    assert found.f1 == pytest.approx(2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3))
    assert str(found) == "precision 0.667 (2 of 3), recall 0.667 (2 of 3), F1 0.667"


def test_agrees_with_scikit_learn() -> None:
    rng = random.Random(0)
    for _ in range(50):
        dropped = [rng.random() < 0.4 for _ in range(30)]
        truth = [rng.random() < 0.3 for _ in range(30)]
        found = score(dropped, truth)
        theirs = precision_recall_fscore_support(truth, dropped, average="binary", zero_division=math.nan)
        assert (found.precision, found.recall, found.f1) == pytest.approx(theirs[:3], nan_ok=True)
        assert sum(vars(found).values()) == 30


def test_undefined_ratios_are_nan() -> None:
    nothing = Detection(0, 0, 0, 9)
    assert math.isnan(nothing.precision) and math.isnan(nothing.recall) and math.isnan(nothing.f1)
    silent = Detection(0, 0, 4, 5)
    assert math.isnan(silent.precision) and silent.recall == 0.0 and silent.f1 == 0.0
    jumpy = Detection(0, 3, 0, 5)
    assert jumpy.precision == 0.0 and math.isnan(jumpy.recall) and jumpy.f1 == 0.0
    assert score([], []) == Detection(0, 0, 0, 0)


def test_parts_add_up() -> None:
    dropped, truth = [True, False, True, True], [True, True, False, True]
    assert score(dropped[:2], truth[:2]) + score(dropped[2:], truth[2:]) == score(dropped, truth)


def test_counts_make_an_interval() -> None:
    found = Detection(19, 1, 3, 77)
    interval = wilson_interval(found.true_positives, found.n_flagged)
    assert interval.value == found.precision and interval.low < found.precision < interval.high


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="false_negatives=-1"):
        Detection(1, 2, -1)
    with pytest.raises(ValueError, match="2 decisions for 3 labels"):
        score([True, False], [True, False, True])
