"""Log-probabilities of responses: by hand, against log_softmax, lean paths equal to plain ones, cuts that change
nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llmcourse.alignment.log_probs import response_lengths, response_log_probs, token_log_probs, trim
from llmcourse.data.packing import IGNORE
from llmcourse.evaluation.perplexity import token_losses
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

B, T, V = 3, 9, 37
CONFIG = ModelConfig(
    vocab_size=V, context_length=16, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24
)


class OnlyLogits(nn.Module):
    """Hides everything of a model but its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Prompts of 2, 4 and 6 tokens, responses of 3, 4 and 1, then padding."""
    torch.manual_seed(1)
    tokens = torch.randint(V, (B, T + 1))
    targets = tokens[:, 1:].clone()
    for row, (prompt, response) in enumerate(((2, 3), (4, 4), (6, 1))):
        targets[row, : prompt - 1] = IGNORE
        targets[row, prompt - 1 + response :] = IGNORE
    return tokens[:, :-1], targets


def test_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4): ln p of the tokens 1 and 0 is ln 3/4 and ln 1/4
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)], [5.0, 5.0]]])
    found = token_log_probs(logits, torch.tensor([[1, 0, IGNORE]]))
    assert found[0].tolist() == pytest.approx([math.log(0.75), math.log(0.25), 0.0], abs=1e-7)


def test_equals_log_softmax_and_its_gradient(rows):
    _, targets = rows
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    mask = targets != IGNORE
    plain = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
    weights = torch.rand(B, T, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    found = token_log_probs(logits, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), plain, atol=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert gradient[~mask].abs().max() == 0


def test_bfloat16_logits_are_summed_in_float32(rows):
    _, targets = rows
    logits = torch.randn(B, T, V).bfloat16()
    found = token_log_probs(logits, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_log_probs(logits.float(), targets))


def test_the_head_sees_target_positions_only(model, rows):
    seen = []
    model.head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    found = response_log_probs(model, *rows)
    assert seen == [(3 + 4 + 1, V)]
    assert torch.allclose(found, -token_losses(model, *rows), atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_every_path_gives_the_same_values_and_gradients(model, rows, chunk_size):
    def values_and_gradients(variant: nn.Module, **options: int) -> list[Tensor]:
        values = response_log_probs(variant, *rows, **options)
        weights = torch.linspace(-1, 2, values.numel()).view_as(values)
        return [values, *torch.autograd.grad((values * weights).sum(), list(model.parameters()))]

    expected = values_and_gradients(OnlyLogits(model))
    for found in (values_and_gradients(model), values_and_gradients(model, chunk_size=chunk_size)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_chunks_keep_fewer_logits_alive(model):
    tokens = torch.randint(V, (4, 16))

    def saved(chunk_size: int | None) -> int:
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[-1:] == (V,):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            response_log_probs(model, tokens, tokens, chunk_size=chunk_size)
        return sum(sizes)

    assert saved(None) >= 64 * V  # the log-softmax of all positions waits for the backward pass
    assert saved(8) == 0


def test_trim_changes_no_log_probability(model, rows):
    tokens, targets = rows
    short_tokens, short_targets = trim(tokens, targets)
    assert short_tokens.shape == short_targets.shape == (B, 7)  # prompt 4 and response 4 need 7 columns
    cut = response_log_probs(model, short_tokens, short_targets)
    assert torch.allclose(cut, response_log_probs(model, tokens, targets)[:, :7], atol=1e-6)
    assert trim(tokens, torch.full_like(targets, IGNORE))[0].shape == (B, 1)


def test_what_stands_behind_a_response_does_not_matter(model, rows):
    tokens, targets = rows
    other = tokens.clone()
    other[0, 4:] = (tokens[0, 4:] + 1) % V  # row 0 has targets at positions 1 to 3
    expected = response_log_probs(model, tokens, targets)
    assert torch.allclose(response_log_probs(model, other, targets), expected, atol=1e-6)
    other[0, 1] = (tokens[0, 1] + 1) % V
    assert not torch.allclose(response_log_probs(model, other, targets)[0], expected[0], atol=1e-3)


def test_lengths(rows):
    assert response_lengths(rows[1]).tolist() == [3, 4, 1]


def test_errors(model, rows):
    tokens, targets = rows
    with pytest.raises(ValueError, match=r"differ in their first axes"):
        token_log_probs(torch.zeros(B, T - 1, V), targets)
    with pytest.raises(ValueError, match=r"must have one shape"):
        response_log_probs(model, tokens[:, :-1], targets)
    with pytest.raises(ValueError, match=r"chunk_size=0"):
        response_log_probs(model, tokens, targets, chunk_size=0)
