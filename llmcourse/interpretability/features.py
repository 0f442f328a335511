"""What does a feature stand for? Scores against known variables, its strongest places, a page to look at.

Shapes: N places (tokens in texts), M features.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def feature_auc(latents: Tensor, truth: Tensor) -> Tensor:
    """Area under the ROC curve of each feature (N, M) as a detector of a variable (N,) bool, (M,) float64.

    The probability that a place with the property has the larger value, ties counted by half; 0.5 is chance.

    Raises:
        ValueError: all places have the property, or none.
    """
    truth = truth.bool()
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not n_true or not n_false:
        raise ValueError(
            f"{n_true} places with the property and {n_false} without: there must be some of each"
        )
    return _auc_from_ranks(_mean_ranks(latents), truth.cpu())


def _mean_ranks(latents: Tensor) -> Tensor:
    """Ranks from 1 in each column, ties with the mean of theirs, (N, M) float64."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(latents.detach().cpu().numpy(), axis=0))


@dataclass(frozen=True)
class Match:
    """The feature that tells a variable best."""

    variable: str
    feature: int
    auc: float
    """on places that did not take part in the choice"""
    chosen_auc: float
    """on those that did; larger, since the largest of many was taken"""
    n_true: int
    """places with the property among those that the first figure is from"""


def match_features(
    latents: Tensor, truths: Mapping[str, Tensor], groups: Sequence[int] | None = None, *, seed: int = 0
) -> list[Match]:
    """For each variable the feature with the largest AUC, chosen on one half of the places and scored on the other.

    `groups` (N,) keeps places of one text on one side. Variables that are constant on a side are left out.
    """
    n = len(latents)
    owners = np.arange(n) if groups is None else np.asarray(groups)
    names = np.unique(owners)
    chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    first = torch.from_numpy(np.isin(owners, chosen))
    sides = [_mean_ranks(latents[side]) for side in (first, ~first)]
    found = []
    for variable, truth in truths.items():
        halves = [truth.bool().cpu()[side] for side in (first, ~first)]
        if any(bool(half.all()) or not bool(half.any()) for half in halves):
            continue
        choice, score = (_auc_from_ranks(ranks, half) for ranks, half in zip(sides, halves, strict=True))
        feature = int(choice.argmax())
        found.append(
            Match(variable, feature, float(score[feature]), float(choice[feature]), int(halves[1].sum()))
        )
    return sorted(found, key=lambda match: -match.auc)


def _auc_from_ranks(ranks: Tensor, truth: Tensor) -> Tensor:
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    return (ranks[truth].sum(dim=0) - n_true * (n_true + 1) / 2) / (n_true * n_false)


@dataclass(frozen=True)
class Place:
    """A token in its text."""

    text: int
    position: int
    value: float


def strongest_places(
    latents: Tensor, owners: Sequence[int], positions: Sequence[int], feature: int, n: int = 8
) -> list[Place]:
    """The n places with the largest values of a feature, at most one from a text, larger ones first; 0 does not
    count."""
    values = latents[:, feature]
    found: list[Place] = []
    seen: set[int] = set()
    for i in values.argsort(descending=True).tolist():
        if values[i] <= 0 or len(found) == n:
            break
        if owners[i] not in seen:
            seen.add(owners[i])
            found.append(Place(owners[i], positions[i], float(values[i])))
    return found


def dashboard_html(
    texts: Sequence[Sequence[str]], values: Sequence[Sequence[float]], *, title: str, note: str = ""
) -> str:
    """A self-contained piece of HTML: texts as tokens, colored by a feature's value there; the value shows on hover.

    Raises:
        ValueError: not one value for each token.
    """
    if [len(one) for one in texts] != [len(one) for one in values]:
        raise ValueError("give one value for each token of each text")
    largest = max((value for one in values for value in one), default=0.0) or 1.0
    rows = []
    for tokens, row in zip(texts, values, strict=True):
        spans = "".join(
            f'<span title="{value:.2f}" style="background:rgba(230,120,0,{max(0.0, value) / largest:.2f})">'
            f"{html.escape(token)}</span>"
            for token, value in zip(tokens, row, strict=True)
        )
        rows.append(f'<p style="margin:.25em 0;white-space:pre-wrap">{spans}</p>')
    return (
        '<figure style="font-family:monospace;font-size:90%;line-height:1.5;border:1px solid #bbb;'
        'padding:.6em;margin:0">'
        f'<figcaption style="font-family:sans-serif"><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>'
        f"{''.join(rows)}</figure>"
    )
