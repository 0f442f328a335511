"""Features against the truth: AUC as scikit-learn's, choices scored on other places, places, pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.interpretability.features import dashboard_html, feature_auc, match_features, strongest_places


def sparse(n: int = 400, m: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, m, generator=generator)
    return values * (torch.rand(n, m, generator=generator) < 0.3)


def test_auc_equals_scikit_learns():
    from sklearn.metrics import roc_auc_score

    latents, truth = sparse(), torch.rand(400) < 0.2
    latents[:, 3] += truth * 0.5
    found = feature_auc(latents, truth)
    for m in range(12):
        assert found[m].item() == pytest.approx(roc_auc_score(truth.numpy(), latents[:, m].numpy()))
    assert feature_auc(torch.zeros(400, 1), truth).item() == 0.5
    with pytest.raises(ValueError, match="some of each"):
        feature_auc(latents, torch.ones(400, dtype=torch.bool))


def test_a_feature_is_chosen_on_one_half_and_scored_on_the_other():
    latents, truth = sparse(), torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.3
    latents[:, 5] = truth.float() + 0.1 * torch.rand(400)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(2)) < 0.3
    found = match_features(latents, {"noise": noise, "real": truth, "constant": torch.ones(400)})
    assert [match.variable for match in found] == ["real", "noise"]
    real, chance = found
    assert real.feature == 5 and real.auc > 0.99
    assert chance.chosen_auc > 0.53 and chance.auc < chance.chosen_auc + 0.05
    assert real.n_true == pytest.approx(0.15 * 400, abs=25)


def test_texts_stay_on_one_side():
    owners = np.repeat(np.arange(20), 20)
    truth = torch.from_numpy(owners % 2 == 0)
    latents = torch.nn.functional.one_hot(torch.from_numpy(owners), 20).float()  # a feature for each text
    (match,) = match_features(latents, {"even": truth}, owners.tolist())
    assert match.auc < 0.51, "what was learned of one text says nothing about others"


def test_the_strongest_places():
    latents = torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 3.0], [0.0, 4.0], [0.0, 0.0]])
    found = strongest_places(latents, [0, 0, 1, 2, 3], [0, 1, 0, 7, 0], 1, n=8)
    assert [(place.text, place.position, place.value) for place in found] == [(0, 1, 5), (2, 7, 4), (1, 0, 3)]
    assert len(strongest_places(latents, [0, 0, 1, 2, 3], [0] * 5, 1, n=2)) == 2
    assert strongest_places(latents, [0, 0, 1, 2, 3], [0] * 5, 0) == []


def test_a_page_shows_tokens_as_text():
    page = dashboard_html([["<b>", " a&b"]], [[0.5, 1.0]], title="feature 3", note="<i>")
    assert "&lt;b&gt;" in page and "a&amp;b" in page and "<b>" not in page.replace("<b>feature 3</b>", "")
    assert "rgba(230,120,0,0.50)" in page and "rgba(230,120,0,1.00)" in page and 'title="1.00"' in page
    with pytest.raises(ValueError, match="one value for each token"):
        dashboard_html([["a"]], [[1.0, 2.0]], title="x")
