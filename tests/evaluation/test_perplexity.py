"""Nats per token, perplexity and bits per byte: by hand, against torch, and the error against a jackknife."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.evaluation.perplexity import TokenLoss, token_loss, token_losses

NONE = -100


class Fixed(nn.Module):
    """Gives token i the probability 2^-(i+1), and the last what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.125]).log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def batch(targets: list[list[int]]) -> dict[str, Tensor]:
    wanted = torch.tensor(targets)
    return {"tokens": torch.zeros_like(wanted), "targets": wanted}


def test_by_hand():
    # code lengths in bits: token 0 costs 1, token 1 costs 2, tokens 2 and 3 cost 3
    measured = token_loss(Fixed(), [batch([[0, 1, NONE], [2, NONE, NONE]]), batch([[3, 3, 0]])])
    bits = (1 + 2) + 3 + (3 + 3 + 1)
    assert measured.n_tokens == 6
    assert measured.total_nats == pytest.approx(bits * math.log(2))
    assert measured.nats_per_token == pytest.approx(bits / 6 * math.log(2))
    assert measured.perplexity == pytest.approx(2 ** (bits / 6))
    assert measured.bits_per_byte(26) == pytest.approx(bits / 26)


def test_losses_of_single_tokens():
    losses = token_losses(Fixed(), **batch([[0, NONE, 2], [1, 3, NONE]]))
    torch.testing.assert_close(losses / math.log(2), torch.tensor([[1.0, 0, 3], [2, 3, 0]]))
    assert losses.dtype == torch.float32


class Table(nn.Module):
    """Logits from a table: a model whose predictions depend on the token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)
        self.dropout = nn.Dropout(0.5)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.table(tokens))


def rows(n: int, T: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(7, (n, T), generator=generator) for _ in range(2))
    lengths = torch.randint(1, T + 1, (n, 1), generator=generator)
    return {"tokens": tokens, "targets": targets.masked_fill(torch.arange(T) >= lengths, NONE)}


def split(whole: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = zip(whole["tokens"].split(size), whole["targets"].split(size), strict=True)
    return [{"tokens": tokens, "targets": targets} for tokens, targets in parts]


def test_it_is_torchs_mean_however_the_rows_are_batched():
    model, whole = Table().eval(), rows(20, 9)
    with torch.no_grad():
        expected = F.cross_entropy(model(whole["tokens"]).flatten(0, 1), whole["targets"].flatten())
    for size in (1, 3, 20):
        assert token_loss(model, split(whole, size)).nats_per_token == pytest.approx(
            float(expected), rel=1e-6
        )


def test_the_standard_error_is_that_of_a_jackknife():
    model, whole = Table().eval(), rows(400, 9)
    measured = token_loss(model, [whole])
    sums = token_losses(model, **whole).detach().double().sum(1)
    counts = (whole["targets"] != NONE).sum(1)
    without = (sums.sum() - sums) / (counts.sum() - counts)  # the mean with each row left out
    n = len(sums)
    jackknife = float(((n - 1) / n * (without - without.mean()).pow(2).sum()).sqrt())
    assert measured.standard_error == pytest.approx(jackknife, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(training):
    model = Table().train(training)
    first, second = (token_loss(model, [rows(20, 9)]) for _ in range(2))
    assert first == second and model.training == training
    assert model.table.weight.grad is None


def test_nothing_to_measure_is_refused():
    for batches in ([], [batch([[NONE, NONE]])]):
        with pytest.raises(ValueError, match=r"no target token to evaluate on"):
            token_loss(Fixed(), batches)


def test_numbers_of_a_known_loss():
    loss = TokenLoss(total_nats=10 * math.log(8), n_tokens=10, standard_error=0.0)
    assert loss.perplexity == pytest.approx(8.0)
    assert loss.bits_per_byte(15) == pytest.approx(2.0)
