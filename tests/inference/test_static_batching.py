"""Static batching gives the same tokens, and computes what nobody asked for."""

from __future__ import annotations

import pytest

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.static_batching import static_batches
from tests.inference.small import CONTEXT, lively_model, some_prompts


def test_greedy_results_are_those_of_each_prompt_alone():
    model = lively_model()
    prompts, lengths = some_prompts(7), [3, 9, 1, 5, 12, 2, 4]
    found = static_batches(ModelRunner(model), prompts, lengths, batch_size=3)
    for prompt, n, ids in zip(prompts, lengths, found, strict=True):
        assert ids == generate(model, [prompt], SamplingParams(temperature=0.0, max_new_tokens=n))[0]


@pytest.mark.parametrize(
    ("prompts", "lengths", "size", "message"),
    [
        ([[1]], [1], 0, "batch_size=0"),
        ([[]], [1], 2, "empty prompt or answer"),
        ([[1]], [0], 2, "empty prompt or answer"),
        ([[1] * 50, [1]], [1, 60], 2, f"exceeds the context of {CONTEXT}"),
    ],
)
def test_refusals(prompts, lengths, size, message):
    with pytest.raises(ValueError, match=message):
        static_batches(ModelRunner(lively_model()), prompts, lengths, batch_size=size)
