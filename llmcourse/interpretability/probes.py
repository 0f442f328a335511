"""Linear probes: can a property be read off an activation by one matrix, and would any property do?

A probe that is right shows that the information is there and linearly readable. It may also have learned the task by
itself, from many inputs of few kinds. A *control task* asks for labels that are random but fixed for each kind of
input: what a probe gets right there is its own capacity, and the difference is its selectivity (Hewitt and Liang,
2019).

Shapes: N examples, D features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """A multinomial logistic regression on standardized features."""

    classes: list[Hashable]
    mean: Tensor
    """(D,) of the training features"""
    deviation: Tensor
    """(D,)"""
    weight: Tensor
    """(classes, D), for standardized features"""
    bias: Tensor
    """(classes,)"""

    def logits(self, features: Tensor) -> Tensor:
        """features (N, D) -> (N, classes)."""
        standardized = (features.float() - self.mean) / self.deviation
        return standardized @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> list[Hashable]:
        """The likeliest class of each example."""
        return [self.classes[i] for i in self.logits(features).argmax(dim=-1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[Hashable]) -> float:
        """Share of examples whose label is predicted."""
        return float(np.mean([a == b for a, b in zip(self.predict(features), labels, strict=True)]))

    def direction(self, label: Hashable, other: Hashable) -> Tensor:
        """What to add to a feature vector (D,) to move the logits from `other` to `label`, of length 1."""
        rows = [self.weight[self.classes.index(one)] / self.deviation for one in (label, other)]
        return torch.nn.functional.normalize(rows[0] - rows[1], dim=0)


def fit_probe(features: Tensor, labels: Sequence[Hashable], *, strength: float = 1.0) -> Probe:
    """Fit a probe with an L2 penalty; `strength` is the inverse of its weight, as scikit-learn's C.

    Raises:
        ValueError: as many labels as examples are needed, at least two different ones, and finite features.
    """
    from sklearn.linear_model import LogisticRegression

    if len(labels) != len(features):
        raise ValueError(f"{len(features)} examples and {len(labels)} labels: give one label each")
    if len(set(labels)) < 2:
        raise ValueError(f"all labels are {labels[0]!r}: a probe needs at least two classes")
    x = features.detach().float().cpu()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("a feature is not finite: look at the activations first")
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    classes = sorted(set(labels), key=str)
    y = np.array([classes.index(label) for label in labels])
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(((x - mean) / deviation).numpy(), y)
    weight, bias = (torch.from_numpy(value).float() for value in (fitted.coef_, fitted.intercept_))
    if len(classes) == 2:  # scikit-learn has one row for two classes
        weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
    return Probe(classes, mean, deviation, weight, bias)


def control_labels(kinds: Sequence[Hashable], labels: Sequence[Hashable], *, seed: int = 0) -> list[Hashable]:
    """Random labels, one for each kind of input, as frequent as the real ones are.

    `kinds` says which inputs are of one kind, for instance the same word: equal kinds get equal labels.
    """
    rng, pool = np.random.default_rng(seed), list(labels)
    of_kind = {kind: pool[int(rng.integers(len(pool)))] for kind in sorted(set(kinds), key=str)}
    return [of_kind[kind] for kind in kinds]


def split_by(groups: Sequence[Hashable], share: float = 0.5, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of training and of test examples such that no group is on both sides.

    Raises:
        ValueError: a share outside of 0 to 1, or a side without a group.
    """
    names = sorted(set(groups), key=str)
    n_train = round(share * len(names))
    if not 0 < share < 1 or not 0 < n_train < len(names):
        raise ValueError(
            f"share={share} of {len(names)} groups leaves one side empty: give more groups, or another share"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(names))[:n_train].tolist())
    in_train = {name for i, name in enumerate(names) if i in chosen}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, group in enumerate(groups):
        sides[0 if group in in_train else 1].append(i)
    return sides
