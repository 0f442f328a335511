"""The interactive picture holds the weights, needs nothing from elsewhere, and shows tokens as text."""

from __future__ import annotations

import json
import re

import pytest
import torch

from llmcourse.interpretability.attention_patterns import attention_html


def some_patterns() -> torch.Tensor:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1)


def test_weights_and_tokens():
    patterns = some_patterns()
    found = attention_html(["<s>", " the", " cat", " &"], patterns, title="a <title>")
    weights = json.loads(re.search(r"weights = (\[.*?\]);", found)[1])
    assert len(weights) == 6 and [len(row) for row in weights[0]] == [1, 2, 3, 4]
    for index, head in enumerate(weights):
        for t, row in enumerate(head):
            expected = patterns[index // 3, index % 3, t, : t + 1] * 100
            assert max(abs(a - b) for a, b in zip(row, expected.tolist(), strict=True)) <= 0.5
    assert "&lt;s&gt;" in found and "a &lt;title&gt;" in found and "<s>" not in found
    assert "layer 1, head 2" in found and "http" not in found and "@@" not in found


def test_chosen_heads_and_a_stable_name():
    patterns, tokens = some_patterns(), list("abcd")
    found = attention_html(tokens, patterns, title="x", heads=[(1, 2)])
    assert found.count("<option>") == 1 and "layer 1, head 2" in found
    assert found == attention_html(tokens, patterns, title="x", heads=[(1, 2)])
    with pytest.raises(ValueError, match="3 tokens and patterns of 4 x 4"):
        attention_html(tokens[:3], patterns, title="x")
