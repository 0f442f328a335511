"""The sparse autoencoder: its formula, at most k, a dictionary found again, dead latents brought back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from llmcourse.interpretability.sparse_autoencoder import (
    ActivationBatches,
    AutoencoderSettings,
    SparseAutoencoder,
    autoencoder_loss,
    unexplained_variance,
)
from llmcourse.training.fit import FitSettings, fit

SETTINGS = AutoencoderSettings(n_latents=24, k=3, dead_after=1000, k_auxiliary=4)


def make(d: int = 8, **changes: int) -> SparseAutoencoder:
    model = SparseAutoencoder(d, dataclasses.replace(SETTINGS, **changes), seed=1)
    with torch.no_grad():
        model.threshold.normal_(std=0.1)
        model.bias.normal_(std=0.1)
        model.encoder.add_(0.1 * torch.randn(model.encoder.shape))
        model.decoder.mul_(torch.rand(len(model.decoder), 1) + 0.5)
    return model


@torch.no_grad()
def test_the_formula_with_a_loop():
    model, x = make(), 3 + 2 * torch.randn(5, 8)
    model.fit_scale(x)
    for row in x:
        z = (row - x.mean(0)) / (x - x.mean(0)).pow(2).mean().sqrt()
        scores = [
            float(((z - model.bias) @ model.encoder[m] + model.threshold[m]).clamp(min=0)) for m in range(24)
        ]
        largest = sorted(range(24), key=lambda m: -scores[m])[:3]
        rebuilt = model.bias + sum(scores[m] * model.decoder[m] / model.decoder[m].norm() for m in largest)
        torch.testing.assert_close(model(row), rebuilt * model.scale + x.mean(0), rtol=1e-5, atol=1e-5)
    latents = model.encode(x)
    assert ((latents > 0).sum(-1) <= 3).all() and (latents >= 0).all()


def test_with_all_latents_it_is_a_plain_relu_autoencoder():
    model, x = make(k=24), torch.randn(6, 8)
    hidden = F.relu((x - model.bias) @ model.encoder.T + model.threshold)
    torch.testing.assert_close(model(x), hidden @ model.directions + model.bias)


def test_the_loss_is_a_sum_and_its_metrics_are_shares():
    model, x = make(), torch.randn(50, 8)
    total, count, metrics = autoencoder_loss(model, {"activations": x})
    assert count == 50
    expected = (x - model(x)).pow(2).mean(-1).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(metrics["unexplained"]) == pytest.approx(unexplained_variance(model, x), rel=1e-4)


def dictionary(n: int = 6000, d: int = 16, m: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations that are sums of 3 of m directions, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    code = torch.zeros(n, m)
    chosen = torch.stack([torch.randperm(m, generator=generator)[:3] for _ in range(n)])
    code.scatter_(1, chosen, 1 + torch.rand(n, 3, generator=generator))
    return code @ directions, directions


def train(model: SparseAutoencoder, x: torch.Tensor, steps: int = 600, lr: float = 1e-2):
    batches = ActivationBatches(x, batch_size=256, seed=0)
    settings = FitSettings(steps=steps, lr=lr, weight_decay=0.0, compile="off", precision="fp32")
    return fit(model, batches, autoencoder_loss, settings, progress=False)


def test_a_known_dictionary_is_found_again():
    x, directions = dictionary()
    model = SparseAutoencoder(16, AutoencoderSettings(n_latents=32, k=3, dead_after=2000))
    model.fit_scale(x)
    before = unexplained_variance(model, x)
    train(model, x)
    assert unexplained_variance(model, x) < 0.15 < before
    nearest = (directions @ model.directions.T).max(dim=1).values
    assert (nearest > 0.9).float().mean() > 0.7


def test_dead_latents_are_counted_and_brought_back():
    x, _ = dictionary()
    shares = {}
    for weight in (0.0, 1 / 4):
        torch.manual_seed(0)
        model = SparseAutoencoder(
            16,
            AutoencoderSettings(n_latents=32, k=3, dead_after=1500, k_auxiliary=8, auxiliary_weight=weight),
        )
        model.fit_scale(x)
        with torch.no_grad():
            model.threshold[10:] = -6.0  # these cannot win at first
        records = train(model, x, steps=400, lr=1e-2).records
        assert max(one["dead"] for one in records) > 0.5
        shares[weight] = records[-1]["dead"]
    assert shares[1 / 4] < shares[0.0] - 0.3


def test_silence_is_counted_in_activations():
    model, x = make(dead_after=120), torch.randn(50, 8)
    with torch.no_grad():
        model.threshold[0] = -1e4
        model.threshold[1] = 1e4
    for _ in range(3):
        autoencoder_loss(model, {"activations": x})
    assert model.silent[0] == 150 and model.silent[1] == 0
    assert model.dead[0] and not model.dead[1]


def test_batches_are_epochs_and_can_be_resumed():
    x = torch.arange(10.0)[:, None]
    source = ActivationBatches(x, batch_size=3, seed=4)
    epoch = torch.cat([source.next()["activations"] for _ in range(3)])[:, 0].tolist()
    assert len(set(epoch)) == 9
    state, following = source.state_dict(), [source.next()["activations"] for _ in range(5)]
    again = ActivationBatches(x, batch_size=3, seed=4)
    again.load_state_dict(state)
    assert all(torch.equal(again.next()["activations"], one) for one in following)
    with pytest.raises(ValueError, match="another seed"):
        ActivationBatches(x, batch_size=3, seed=5).load_state_dict(state)


def test_refusals():
    for bad in ({"k": 0}, {"k": 600}, {"auxiliary_weight": -1.0}):
        with pytest.raises(ValueError, match="give"):
            AutoencoderSettings(**bad)
    with pytest.raises(ValueError, match="do not vary"):
        make().fit_scale(torch.ones(4, 8))
    for size, seed in ((0, 0), (9, 0), (2, -1)):
        with pytest.raises(ValueError, match="give"):
            ActivationBatches(torch.ones(4, 8), batch_size=size, seed=seed)
