"""Probes find what is there, control tasks what they can do by themselves, splits keep groups together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.interpretability.probes import control_labels, fit_probe, split_by


def some_data(n: int = 600, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [("red", "green", "blue")[i % 3] for i in range(n)]
    centers = torch.tensor([[2.0, 0, 0, 0], [0, 30.0, 0, 0], [0, 0, -2.0, 0]])
    noise = torch.randn(n, 4, generator=generator) * torch.tensor([1, 15.0, 1, 100])
    return centers[[i % 3 for i in range(n)]] + noise, labels


def test_a_probe_reads_what_is_linear():
    features, labels = some_data()
    probe = fit_probe(features[:300], labels[:300])
    assert probe.accuracy(features[300:], labels[300:]) > 0.8
    assert set(probe.predict(features[300:])) == {"red", "green", "blue"}
    shuffled = [labels[i] for i in np.random.default_rng(0).permutation(300)]
    assert fit_probe(features[:300], shuffled).accuracy(features[300:], labels[300:]) < 0.5


def test_two_classes_equal_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    features, labels = some_data()
    keep = [i for i, label in enumerate(labels) if label != "blue"]
    x, y = features[keep], [labels[i] for i in keep]
    probe = fit_probe(x, y, strength=0.5)
    standardized = (x - x.mean(0)) / x.std(0)
    reference = LogisticRegression(C=0.5, max_iter=1000).fit(standardized.numpy(), y)
    odds = probe.logits(x)
    found = (odds[:, probe.classes.index("red")] - odds[:, probe.classes.index("green")]).numpy()
    np.testing.assert_allclose(found, reference.decision_function(standardized.numpy()), rtol=1e-3, atol=1e-3)


def test_the_direction_moves_the_odds():
    features, labels = some_data()
    probe = fit_probe(features, labels)
    direction = probe.direction("red", "blue")
    assert direction.norm().item() == pytest.approx(1)
    red, blue = probe.classes.index("red"), probe.classes.index("blue")
    before, after = probe.logits(features), probe.logits(features + direction)
    assert ((after - before)[:, red] - (after - before)[:, blue] > 0).all()


def test_control_labels_are_fixed_for_a_kind_and_as_frequent():
    kinds = [f"word {i % 400}" for i in range(4000)]
    labels = ["rare" if i % 10 == 0 else "common" for i in range(4000)]
    found = control_labels(kinds, labels, seed=1)
    by_kind = {}
    for kind, label in zip(kinds, found, strict=True):
        assert by_kind.setdefault(kind, label) == label
    assert 0.04 < np.mean([label == "rare" for label in by_kind.values()]) < 0.17
    assert found == control_labels(kinds, labels, seed=1) != control_labels(kinds, labels, seed=2)


def test_groups_stay_on_one_side():
    groups = [i // 7 for i in range(210)]
    train, test = split_by(groups, 0.4, seed=3)
    assert sorted(train + test) == list(range(210)) and len(train) == 12 * 7
    assert not {groups[i] for i in train} & {groups[i] for i in test}
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_by([1, 1, 1])


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.randn(3, 2), ["a", "b"], "3 examples and 2 labels"),
        (torch.randn(3, 2), ["a"] * 3, "at least two classes"),
        (torch.tensor([[1.0], [float("nan")]]), ["a", "b"], "not finite"),
    ],
)
def test_refusals(features, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(features, labels)
