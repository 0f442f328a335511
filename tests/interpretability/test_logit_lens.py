"""Lens and attribution equal a plain recomputation, and the terms of a logit add up to it."""

from __future__ import annotations

import pytest
import torch

from llmcourse.interpretability import record
from llmcourse.interpretability.logit_lens import components, logit_attribution, logit_lens, read_stream
from llmcourse.models.attention import rms_norm
from tests.inference.small import lively_model
from tests.interpretability.test_hooks import plain, some_tokens


@torch.no_grad()
def test_the_lens_reads_every_layer():
    model, tokens = lively_model(), some_tokens()
    found, expected = logit_lens(model, tokens), plain(model, tokens)
    assert found.shape == (3, *model(tokens).shape)
    torch.testing.assert_close(found[-1], model(tokens).log_softmax(-1), rtol=1e-5, atol=1e-5)
    for layer, name in enumerate(("embedding", "blocks.0.residual_after", "blocks.1.residual_after")):
        stream = rms_norm(expected[name], model.final_norm.weight, model.config.norm_eps)
        by_hand = (stream @ model.head.weight.T).log_softmax(-1)
        torch.testing.assert_close(found[layer], by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        read_stream(model, expected["embedding"]), model.head(model.final_norm(expected["embedding"]))
    )


@torch.no_grad()
def test_components_add_up_to_the_stream():
    model, tokens = lively_model(), some_tokens()
    parts = components(model, tokens)
    assert len(parts) == 1 + 2 * (4 + 1)
    _, found = record(model, tokens, "blocks.1.residual_after")
    torch.testing.assert_close(sum(parts.values()), found["blocks.1.residual_after"], rtol=1e-5, atol=1e-5)
    heads = sum(parts[f"blocks.0.head.{h}"] for h in range(4))
    torch.testing.assert_close(heads, plain(model, tokens)["blocks.0.attention_output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [-1, 4])
@torch.no_grad()
def test_attributions_add_up_to_the_logits(position):
    model, tokens = lively_model(), some_tokens()
    with torch.no_grad():
        model.final_norm.weight.uniform_(0.5, 2)
    answers, others = [5, 9, 33], [7, 7, 1]
    logits = model(tokens)[:, position]
    rows = torch.arange(3)
    single = logit_attribution(model, tokens, answers, position=position)
    torch.testing.assert_close(sum(single.values()), logits[rows, answers], rtol=1e-5, atol=1e-5)
    lead = logit_attribution(model, tokens, answers, others, position=position)
    torch.testing.assert_close(
        sum(lead.values()), logits[rows, answers] - logits[rows, others], rtol=1e-5, atol=1e-5
    )
