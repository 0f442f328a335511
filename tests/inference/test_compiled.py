"""The decoder of fixed shapes: the same tokens as `generate`, compiled or not."""

from __future__ import annotations

import pytest
import torch

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.compiled import CompiledDecoder
from tests.inference.small import CONTEXT, lively_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=10)


def test_fixed_shapes_change_nothing():
    model = lively_model()
    decoder = CompiledDecoder(model, 3, 20, mode=None)
    expected = generate(model, PROMPTS, GREEDY)
    assert decoder.generate(PROMPTS, GREEDY) == expected
    assert decoder.generate(PROMPTS, GREEDY) == expected, "a second run finds nothing of the first"
    seeded = SamplingParams(max_new_tokens=10, seed=3)
    assert decoder.generate(PROMPTS, seeded) == generate(model, PROMPTS, seeded)


@pytest.mark.slow
def test_compiled_changes_nothing():
    torch.compiler.reset()
    model = lively_model(n_layers=1)
    decoder = CompiledDecoder(model, 3, 20)
    expected = generate(model, PROMPTS, GREEDY)
    assert decoder.generate(PROMPTS, GREEDY) == expected
    with torch.no_grad():
        model.embedding.weight.mul_(-1)
    assert decoder.generate(PROMPTS, GREEDY) == generate(model, PROMPTS, GREEDY), (
        "it reads the weights as they are now"
    )


def test_refusals():
    model = lively_model()
    with pytest.raises(ValueError, match="the model's context"):
        CompiledDecoder(model, 1, CONTEXT + 1, mode=None)
    decoder = CompiledDecoder(model, 2, 12, mode=None)
    with pytest.raises(ValueError, match="give 2 of one length"):
        decoder.generate(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="give 2 of one length"):
        decoder.generate([[1], [1, 2]], GREEDY)
    with pytest.raises(ValueError, match="was made for 12"):
        decoder.generate(PROMPTS[:2], GREEDY)
