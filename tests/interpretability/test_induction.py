"""Induction scores by a loop over positions; losses of both halves; heads that are removed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmcourse.interpretability.induction import (
    half_losses,
    head_scores,
    mean_head_outputs,
    repeated_tokens,
    without_heads,
)
from tests.inference.small import lively_model
from tests.interpretability.test_hooks import plain


def test_rows_are_written_twice():
    tokens = repeated_tokens(range(10, 40), 5, 8, first=3, seed=2)
    assert tokens.shape == (5, 17) and (tokens[:, 0] == 3).all()
    assert torch.equal(tokens[:, 1:9], tokens[:, 9:])
    assert all(len(set(row.tolist())) == 8 for row in tokens[:, 1:9]) and tokens[:, 1:].min() >= 10
    assert not torch.equal(tokens, repeated_tokens(range(10, 40), 5, 8, first=3, seed=3))
    with pytest.raises(ValueError, match="7 tokens for rows of 8"):
        repeated_tokens(range(7), 1, 8)


@pytest.mark.parametrize("first", [None, 0])
@torch.no_grad()
def test_scores_by_a_loop(first):
    model = lively_model()
    tokens = repeated_tokens(range(1, 60), 4, 7, first=first)
    found, values = head_scores(model, tokens, 7), plain(model, tokens)
    for layer in range(2):
        pattern, start = values[f"blocks.{layer}.pattern"].mean(0), tokens.shape[1] - 7
        for head in range(4):
            by_name = {
                "previous": [pattern[head, t, t - 1] for t in range(1, tokens.shape[1])],
                "duplicate": [pattern[head, t, t - 7] for t in range(start, tokens.shape[1] - 1)],
                "induction": [pattern[head, t, t - 6] for t in range(start, tokens.shape[1] - 1)],
            }
            for name, terms in by_name.items():
                assert found[name][layer, head].item() == pytest.approx(
                    float(sum(terms) / len(terms)), abs=1e-6
                )
    for t in range(start, tokens.shape[1] - 1):
        assert torch.equal(tokens[:, t - 6], tokens[:, t + 1]), (
            "the place looked at holds the token that comes next"
        )


@torch.no_grad()
def test_losses_of_both_halves():
    model, tokens = lively_model(), repeated_tokens(range(1, 60), 3, 6, first=0)
    losses = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    first, second = half_losses(model, tokens, 6)
    assert first == pytest.approx(float(losses[:, :6].mean()), rel=1e-5)
    assert second == pytest.approx(float(losses[:, 7:].mean()), rel=1e-5)


@torch.no_grad()
def test_removed_heads_are_heads_without_output():
    model, tokens = lively_model(), repeated_tokens(range(1, 60), 3, 6)
    without = copy.deepcopy(model)
    C = model.config.d_head
    for layer, head in ((0, 2), (1, 0), (1, 3)):
        without.blocks[layer].attention.output.weight[:, head * C : (head + 1) * C] = 0
    assert half_losses(model, tokens, 6, without_heads([(1, 0), (0, 2), (1, 3)])) == pytest.approx(
        half_losses(without, tokens, 6), rel=1e-5
    )
    means = mean_head_outputs(model, tokens)
    assert means["blocks.0.head_outputs"].shape == (4, C)
    one_row = tokens[:1, :1]
    only = mean_head_outputs(model, one_row)
    kept = half_losses(model, one_row.repeat(1, 5), 2, without_heads([(0, 1)], only))
    assert kept != half_losses(model, one_row.repeat(1, 5), 2, without_heads([(0, 1)]))
