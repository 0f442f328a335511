"""Patches equal a plain recomputation; the first-order estimate is a derivative; paths are direct."""

from __future__ import annotations

import pytest
import torch

from llmcourse.interpretability import record
from llmcourse.interpretability.hooks import set_to
from llmcourse.interpretability.patching import (
    attribution_patch,
    logit_lead,
    patch_heads,
    patch_path,
    patch_positions,
    recovered,
)
from llmcourse.models.transformer import Transformer
from tests.inference.small import lively_model
from tests.interpretability.test_hooks import plain, some_tokens


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively_model(n_layers=3)


CLEAN, CORRUPTED = some_tokens(seed=1), some_tokens(seed=1)
CORRUPTED[:, 2] = (CORRUPTED[:, 2] + 5) % 61
METRIC = logit_lead([4, 8, 15], [16, 23, 42])


def from_block(model: Transformer, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """Logits from a stream before a block, without any hook."""
    cos, sin = model.rope(stream.shape[1])
    for block in model.blocks[layer:]:
        stream = block(stream, cos, sin)
    return model.head(model.final_norm(stream))


def test_the_lead_by_hand(model):
    logits = model(CLEAN).detach()
    expected = [
        float(logits[i, -1, a] - logits[i, -1, b]) for i, (a, b) in enumerate(((4, 16), (8, 23), (15, 42)))
    ]
    assert METRIC(logits).tolist() == pytest.approx(expected)


@torch.no_grad()
def test_a_map_of_the_stream_equals_plain_runs(model):
    found = patch_positions(model, CLEAN, CORRUPTED, "residual_before", METRIC)
    clean, corrupted = plain(model, CLEAN), plain(model, CORRUPTED)
    assert found.shape == (3, 9, 3)
    for layer in range(3):
        for position in (0, 2, 8):
            stream = corrupted[f"blocks.{layer}.residual_before"].clone()
            stream[:, position] = clean[f"blocks.{layer}.residual_before"][:, position]
            torch.testing.assert_close(
                found[layer, position], METRIC(from_block(model, layer, stream)), rtol=1e-5, atol=1e-5
            )
    before, after = METRIC(model(CORRUPTED)), METRIC(model(CLEAN))
    torch.testing.assert_close(found[0, 0], before, rtol=1e-5, atol=1e-5, msg="the prompts agree there")
    torch.testing.assert_close(
        found[0, 2], after, rtol=1e-5, atol=1e-5, msg="the only difference, at the start"
    )
    share = recovered(found, after, before)
    assert share[0, 2].item() == pytest.approx(1, abs=1e-4) and abs(share[0, 0].item()) < 1e-4
    last = patch_positions(model, CLEAN, CORRUPTED, "residual_after", METRIC)[-1]
    torch.testing.assert_close(last[-1], after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last[3], before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_patched_head_equals_a_plain_run(model):
    found = patch_heads(model, CLEAN, CORRUPTED, METRIC)
    assert found.shape == (3, 4, 3)
    clean, corrupted = plain(model, CLEAN), plain(model, CORRUPTED)
    block, head = model.blocks[1], 2
    change = (clean["blocks.1.head_outputs"] - corrupted["blocks.1.head_outputs"])[:, :, head]
    C = model.config.d_head
    middle = (
        corrupted["blocks.1.residual_middle"]
        + change @ block.attention.output.weight[:, head * C : (head + 1) * C].T
    )
    stream = middle + block.mlp(block.mlp_norm(middle))
    torch.testing.assert_close(found[1, head], METRIC(from_block(model, 2, stream)), rtol=1e-5, atol=1e-5)


def test_the_estimate_is_the_derivative_of_a_patch(model):
    estimate = attribution_patch(model, CLEAN, CORRUPTED, "residual_before", METRIC)
    clean, corrupted = plain(model, CLEAN), plain(model, CORRUPTED)
    with torch.no_grad():
        start, eps = METRIC(model(CORRUPTED)), 1e-3
        for layer, position in ((0, 2), (1, 2), (2, 8)):
            stream = corrupted[f"blocks.{layer}.residual_before"].double()
            step = torch.zeros_like(stream)
            step[:, position] = (clean[f"blocks.{layer}.residual_before"].double() - stream)[:, position]
            double = lively_model(n_layers=3).double()
            double.cos, double.sin = model.cos.double(), model.sin.double()
            sides = [METRIC(from_block(double, layer, stream + sign * eps * step)) for sign in (1, -1)]
            slope = ((sides[0] - sides[1]) / (2 * eps)).float()
            torch.testing.assert_close(estimate[layer, position] - start, slope, rtol=2e-2, atol=2e-3)
    assert estimate.shape == (3, 9, 3) and not estimate.requires_grad


@torch.no_grad()
def test_a_direct_path_to_the_output(model):
    found = patch_path(model, CLEAN, CORRUPTED, [(1, 0), (2, 3)], ["logits"], METRIC)
    clean, corrupted = plain(model, CLEAN), plain(model, CORRUPTED)
    stream, C = clean["blocks.2.residual_after"].clone(), model.config.d_head
    for layer, head in ((1, 0), (2, 3)):
        name = f"blocks.{layer}.head_outputs"
        change = (corrupted[name] - clean[name])[:, :, head]
        stream += change @ model.blocks[layer].attention.output.weight[:, head * C : (head + 1) * C].T
    torch.testing.assert_close(found, METRIC(model.head(model.final_norm(stream))), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_path_to_the_keys_of_a_later_layer(model):
    found = patch_path(model, CLEAN, CORRUPTED, [(0, 1)], ["blocks.2.keys"], METRIC)
    clean, corrupted = plain(model, CLEAN), plain(model, CORRUPTED)
    C = model.config.d_head
    change = (corrupted["blocks.0.head_outputs"] - clean["blocks.0.head_outputs"])[:, :, 1]
    stream = (
        clean["blocks.2.residual_before"] + change @ model.blocks[0].attention.output.weight[:, C : 2 * C].T
    )
    block = model.blocks[2]
    keys = block.attention.key(block.attention_norm(stream)).unflatten(-1, (2, -1))
    logits, _ = record(model, CLEAN, "logits", {"blocks.2.keys": set_to(keys)})
    torch.testing.assert_close(found, METRIC(logits), rtol=1e-5, atol=1e-5)
    through_all = METRIC(
        record(model, CLEAN, "logits", {"blocks.0.head_outputs": set_to(corrupted["blocks.0.head_outputs"])})[
            0
        ]
    )
    assert not torch.allclose(found, through_all)


def test_refusals(model):
    with pytest.raises(ValueError, match="must align"):
        patch_heads(model, CLEAN, CORRUPTED[:, :-1], METRIC)
    with pytest.raises(ValueError, match="two equal prompts"):
        patch_heads(model, CLEAN, CLEAN, METRIC)
    with pytest.raises(ValueError, match="a path goes forward"):
        patch_path(model, CLEAN, CORRUPTED, [(1, 0)], ["blocks.1.keys"], METRIC)
    with pytest.raises(ValueError, match="give logits alone"):
        patch_path(model, CLEAN, CORRUPTED, [(0, 0)], ["logits", "blocks.1.keys"], METRIC)


@pytest.mark.parametrize(
    "point", ["blocks.2.mlp_output", "blocks.2.head_outputs", "blocks.2.attention_output"]
)
def test_what_is_held_cannot_receive(model, point):
    with pytest.raises(ValueError, match="cannot receive"):
        patch_path(model, CLEAN, CORRUPTED, [(0, 1)], [point], METRIC)
