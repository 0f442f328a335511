"""Steering adds a vector and takes it off again; a direction that is removed is gone."""

from __future__ import annotations

import pytest
import torch

from llmcourse.interpretability import record
from llmcourse.interpretability.steering import cosine, mean_difference, steered, without_direction
from tests.inference.small import lively_model
from tests.interpretability.test_hooks import some_tokens


def test_the_difference_of_means():
    wanted, unwanted = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    assert mean_difference(wanted, unwanted).tolist() == [2, 1]
    with pytest.raises(ValueError, match="1 wanted and 0 unwanted"):
        mean_difference(wanted[:1], wanted[:0])


@torch.no_grad()
def test_a_vector_is_added_behind_one_block():
    model, tokens = lively_model(), some_tokens()
    vector = torch.randn(model.config.d_model)
    expected, plainly = record(model, tokens, "blocks.*.residual_after")
    with steered(model, 0, vector, 2.0, positions=[3]):
        _, found = record(model, tokens, "blocks.0.residual_after")
    change = found["blocks.0.residual_after"] - plainly["blocks.0.residual_after"]
    torch.testing.assert_close(change[:, 3], (2 * vector).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert not change[:, [0, 1, 2, 4]].any()
    assert torch.equal(model(tokens), expected)


@torch.no_grad()
def test_a_removed_direction_is_gone_from_every_layer():
    model, tokens = lively_model(), some_tokens()
    vector = torch.randn(model.config.d_model)
    with without_direction(model, vector):
        _, found = record(model, tokens, "blocks.*.residual_after")
    for value in found.values():
        assert (value @ (vector / vector.norm())).abs().max() < 1e-4
    with pytest.raises(ValueError, match="no direction"), without_direction(model, 0 * vector):
        pass


def test_cosine():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**-0.5)
